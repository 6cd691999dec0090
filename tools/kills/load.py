"""The load of a run: programs that verify what they wrote, each started again whenever it has ended, until the run is over.

    hog        real pages in a memory cgroup, every byte compared with a hash (tools/hog.py)
    fio        random writes with checksums to a file on the file system of the image, read back and verified
    stress-ng  memory of known patterns in a memory cgroup, verified

A program that ends with another exit code than 0 is a fault.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from tmemfs.units import MIB
from tools.bench.limited import oom_kills, within
from tools.cgroup import MemoryCgroup
from tools.interrupts import usual_signals
from tools.soak.hogs import Hog
from tools.soak.places import HANG_S, Fault

PROGRAMS: Final = ("fio", "stress-ng", "mkfs.ext4", "e2fsck")
_HOG_SIZE: Final = "288M"
_HOG_LIMIT: Final = 96 * MIB
_STRESS_LIMIT: Final = 96 * MIB
_STRESS_BYTES: Final = 160 * MIB
_STRESS_S: Final = 20
_FIO_BYTES: Final = 128 * MIB
_FRESH_S: Final = 0.05
_SAID_CHARS: Final = 600


@dataclass(slots=True)
class Again:
    """A command that is started again whenever it has ended well, in `directory`. `count` adds what its output says to `counts`."""

    name: str
    command: Sequence[str]
    directory: Path
    log: IO[bytes]
    count: Callable[[str, Counter[str]], None]
    counts: Counter[str]
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        """Start it."""
        self.log.seek(0)
        self.log.truncate()
        self._process = subprocess.Popen(
            self.command, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=usual_signals,
        )  # fmt: skip

    def check(self) -> None:
        """Start it again if it has ended. Raises Fault if it ended badly."""
        if self._process is not None and self._process.poll() is not None:
            self._ends(self._process)
            self.start()

    def stop(self) -> None:
        """Wait for its end. Raises Fault if it does not end, or badly."""
        if self._process is not None:
            try:
                self._process.wait(HANG_S)
            except subprocess.TimeoutExpired:
                raise Fault(f"{self.name} did not end within {HANG_S:.0f} s") from None
            self._ends(self._process)

    def kill(self) -> None:
        """End it and its children at once."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(HANG_S)
        self._process = None

    def _ends(self, process: subprocess.Popen[bytes]) -> None:
        self._process = None
        self.log.seek(0)
        said = self.log.read().decode(errors="replace")
        if process.returncode:
            raise Fault(f"{self.name} ended with {process.returncode}: {said[-_SAID_CHARS:]}")
        self.counts[f"{self.name} runs"] += 1
        self.count(said, self.counts)


@dataclass(slots=True)
class Load:
    """All programs of a run."""

    hog: Hog
    again: tuple[Again, ...]
    cgroups: tuple[MemoryCgroup, ...]
    counts: Counter[str]

    def start(self) -> None:
        """Start all."""
        self.hog.start(0)
        for program in self.again:
            program.start()

    def check(self) -> None:
        """Start again what has ended. Raises Fault if something ended badly."""
        self.hog.check(0)
        for program in self.again:
            program.check()

    def stop(self) -> None:
        """Have all verify what they have, and end. Raises Fault."""
        for program in self.again:
            program.stop()
        self.hog.stop(0)
        # of stress-ng, which starts such a child again: reclaim in a cgroup gives up early with any swap
        self.counts["OOM kills in the cgroups"] = sum(map(oom_kills, self.cgroups))


@contextmanager
def load(directory: Path, files: Path, seed: int, counts: Counter[str]) -> Iterator[Load]:
    """The programs, which are not started yet; `files` is the file system for fio. Killed at the end."""
    with ExitStack() as stack:
        hogs = stack.enter_context(MemoryCgroup("kills-hog", _HOG_LIMIT))
        stressed = stack.enter_context(MemoryCgroup("kills-stress", _STRESS_LIMIT))
        hog = Hog("kills", hogs, directory, seed % 1000, counts, _HOG_SIZE)
        stack.callback(hog.kill)
        commands = (("fio", _fio(files), _count_fio), ("stress-ng", within(stressed, *_stress(directory)), _count_stress))
        again = []
        for name, command, count in commands:
            log = stack.enter_context((directory / f"{name}.log").open("w+b"))
            again.append(Again(name, command, directory, log, count, counts))
            stack.callback(again[-1].kill)
        stack.enter_context(_fresh_statistics(hogs, stressed))
        yield Load(hog, tuple(again), (hogs, stressed), counts)


@contextmanager
def _fresh_statistics(*cgroups: MemoryCgroup) -> Iterator[None]:
    """Have the kernel bring the statistics of the cgroups up to date for the block.

    It decides by them what to reclaim, and kills where they are seconds old (docs/benchmarks.md).
    """
    end = threading.Event()

    def run() -> None:
        while not end.wait(_FRESH_S):
            for cgroup in cgroups:
                (cgroup.path / "memory.stat").read_bytes()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def missing_programs() -> list[str]:
    """What is not installed of what the load needs."""
    return [
        program
        for program in PROGRAMS
        if shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/sbin:/usr/sbin") is None
    ]


def _fio(files: Path) -> list[str]:
    # --thread: a process of its own for the job would leave our process group, and outlive it
    return [
        "fio", "--name=verify", f"--directory={files}", f"--size={_FIO_BYTES}", "--thread", "--rw=randwrite", "--bsrange=4k-128k",
        "--direct=1", "--ioengine=libaio", "--iodepth=8", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randrepeat=0",
        "--fsync=64", "--buffer_compress_percentage=50", "--refill_buffers", "--output-format=json",
    ]  # fmt: skip


def _stress(directory: Path) -> list[str]:
    return [
        "stress-ng", "--vm", "1", "--vm-bytes", f"{_STRESS_BYTES}", "--vm-keep", "--vm-method", "rand-set", "--verify",
        "--timeout", f"{_STRESS_S}s",
        "--metrics-brief", "--temp-path", str(directory),
    ]  # fmt: skip


def _count_fio(said: str, counts: Counter[str]) -> None:
    job = json.loads(said[said.index("{") :])["jobs"][0]
    if job["error"]:
        raise Fault(f"fio: error {job['error']}")
    counts["fio MB"] += job["read"]["io_bytes"] // 1_000_000


def _count_stress(said: str, counts: Counter[str]) -> None:
    for line in said.splitlines():
        words = line.partition("]")[2].split()
        if words[:1] == ["vm"] and len(words) > 2:
            counts["stress-ng operations"] += int(float(words[1]))
