"""A large program that is resumed: it idles, a hog takes its memory and ends, and the program is asked for all that it holds.

    redis     redis-server, and DEBUG DIGEST of all its values, which are cut out of real pages
    python    a process with a large heap (heap_program.py), and a checksum of all of it
    jvm       the same in Java (HeapProgram.java)

The program and the hog (tools/grow.py, which locks memory) are in one cgroup, which can hold the program and little more. The hog
locks nearly all of that, so the program is swapped out; how much of it was is a figure. Then the program idles for as long as is
asked. Its first answer is that to a small request, the last that to a request that touches every page. Both answers are verified.
In the part resume-ram the pool may keep everything, in resume-disk as much as in an overcommit. The wear is that of the whole, from
the start of the hog until the daemon is idle again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from tmemfs.units import MIB, PAGE_BYTES
from tools.bench.accounts import Meter, parse_status_bytes
from tools.bench.contenders import Swap
from tools.bench.limited import ProgramFailed, each_limited, measured, within
from tools.bench.line_program import LineProgram
from tools.bench.redis_client import VALUE_BESIDE_BYTES
from tools.bench.redis_server import redis_client, redis_server
from tools.bench.toucher import WrongBytes
from tools.bench.workloads import Figures
from tools.cgroup import MemoryCgroup

_ROOT: Final = Path(__file__).parents[2]
_GROW: Final = _ROOT / "tools" / "grow.py"
_HEAP: Final = Path(__file__).with_name("heap_program.py")
_JAVA: Final = Path(__file__).with_name("HeapProgram.java")
_VALUE_BYTES: Final = 1000
#: An object of bytes, its entry and its number: 1147 bytes for a value of 1000 (Python 3.11).
_PYTHON_BESIDE_BYTES: Final = 147
#: Headers, an entry, a number and a place in the table, and an eighth that the collector is to have free.
_JAVA_BESIDE_BYTES: Final = 200
_YOUNG_BYTES: Final = 32 * MIB
#: A JVM that has compiled its program.
_JVM_BYTES: Final = 128 * MIB
#: What the cgroup has beside the program, and what the hog leaves of that.
_BESIDE_BYTES: Final = 96 * MIB
_LEFT_BYTES: Final = 64 * MIB
#: A program of that many times a limited pool: what its values compress to is about one and a half times the pool.
_OF_POOL: Final = 3.5
#: An SD card takes a minute for what is written and another for what is read.
_ANSWER_S: Final = 400.0


@dataclass(frozen=True, slots=True)
class ResumeSizes:
    """The memory of the program, and how long it idles once it is swapped out."""

    program_bytes: int
    idle_s: float

    @classmethod
    def of(cls, pool_bytes: int, idle_s: float) -> ResumeSizes:
        """For a limited pool of `pool_bytes`."""
        return cls(int(pool_bytes * _OF_POOL) // PAGE_BYTES * PAGE_BYTES, idle_s)

    @property
    def limit_bytes(self) -> int:
        """The limit of the cgroup."""
        return self.program_bytes + _BESIDE_BYTES

    @property
    def hog_bytes(self) -> int:
        """What the hog locks."""
        return self.limit_bytes - _LEFT_BYTES

    @property
    def swap_bytes(self) -> int:
        """Four times what is swapped: the kernel keeps slots of clean pages until a swap is half full."""
        return 4 * self.program_bytes


class Resumed(Protocol):
    """A program that holds its data."""

    @property
    def pid(self) -> int:
        """Its process."""

    def ping(self) -> None:
        """Ask for something small. Raises if there is no answer."""

    def digest(self) -> str:
        """Ask for a checksum of everything it holds."""


@dataclass(frozen=True, slots=True)
class ResumeStage:
    """What the programs run on; `place` is theirs."""

    swap: Swap
    base: Path
    place: Path
    sizes: ResumeSizes


def resumed(part: str, stage: ResumeStage, wanted: Collection[str]) -> Iterator[tuple[str, Figures]]:
    """The figures of each `wanted` program that is installed, named after the `part`. Raises ProgramFailed at the end."""
    stage.place.mkdir(exist_ok=True)
    absent = missing()
    limits = {name: stage.sizes.limit_bytes for name in PROGRAMS if name in wanted and name not in absent}
    yield from each_limited(part, limits, lambda name, cgroup: _resumed(stage, PROGRAMS[name], cgroup))


def missing() -> dict[str, str]:
    """The programs that are not installed, and the Debian packages that have them."""
    # the compiler launches a program from its source
    needs = {"redis": ("redis-server", "redis-server"), "jvm": ("javac", "default-jdk-headless")}
    return {name: f"not installed: apt-get install {package}" for name, (file, package) in needs.items() if not shutil.which(file)}


def _resumed(stage: ResumeStage, start: Start, cgroup: MemoryCgroup) -> Figures:
    with start(stage, cgroup) as program:
        whole = program.digest()
        resident_s, again = _timed(program.digest)
        meter = Meter(stage.swap.daemons, (), stage.swap.disk, stage.swap.counters)
        stage.swap.settle()
        before = meter.now()
        hog_s, _ = _timed(lambda: _hog(stage.sizes.hog_bytes, cgroup))
        time.sleep(stage.sizes.idle_s)
        share = swapped_share(Path(f"/proc/{program.pid}/status").read_text())
        (first_s, answer_s, digest), used = measured(stage.swap, (program.pid,), lambda: _asked(program))
        if not whole == again == digest:
            raise WrongBytes(f"the program holds other data than before it was swapped out: {digest}, not {whole}")
        return {"answer_s": answer_s, "first_s": first_s, "resident_s": resident_s, "swapped_share": share, "hog_s": hog_s,
                "pages_in": used.pages_in, "disk_read_bytes": used.disk.read_bytes, "daemon_s": used.daemon_s,
                "kworkers_s": used.kworkers_s, "process_s": used.process_s, **meter.now().since(before).wear}  # fmt: skip


def _asked(program: Resumed) -> tuple[float, float, str]:
    """The seconds until the first answer and until the whole one, and that."""
    began = time.monotonic()
    program.ping()
    first_s = time.monotonic() - began
    digest = program.digest()
    return first_s, time.monotonic() - began, digest


def _timed(work: Callable[[], str]) -> tuple[float, str]:
    began = time.monotonic()
    found = work()
    return time.monotonic() - began, found


def _hog(size_bytes: int, cgroup: MemoryCgroup) -> str:
    """Lock `size_bytes` in `cgroup`, and release them. Raises ProgramFailed."""
    command = [sys.executable, str(_GROW), "--size", str(size_bytes), "--tasks", str(cgroup.tasks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False, start_new_session=True)
    if done.returncode:
        raise ProgramFailed(f"the hog ended with exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def swapped_share(status: str) -> float:
    """The share of the anonymous memory in /proc/PID/status that is swapped out."""
    swapped, resident = (parse_status_bytes(status, key) for key in ("VmSwap", "RssAnon"))
    return swapped / max(swapped + resident, 1)


@dataclass(frozen=True, slots=True)
class _Redis:
    """A filled redis-server."""

    pid: int
    ping: Callable[[], None]
    digest: Callable[[], str]


@contextmanager
def _redis(stage: ResumeStage, cgroup: MemoryCgroup) -> Iterator[Resumed]:
    with (
        redis_server(stage.place, cgroup, enable_debug_command="local") as (server, path),
        redis_client(path, stage.base, _VALUE_BYTES, _ANSWER_S) as client,
    ):
        client.fill(stage.sizes.program_bytes // (_VALUE_BYTES + VALUE_BESIDE_BYTES))
        yield _Redis(server.pid, client.ping, client.digest)


@contextmanager
def _python(stage: ResumeStage, cgroup: MemoryCgroup) -> Iterator[Resumed]:
    count = stage.sizes.program_bytes // (_VALUE_BYTES + _PYTHON_BESIDE_BYTES)
    command = within(cgroup, sys.executable, str(_HEAP), str(stage.base), str(count), str(_VALUE_BYTES))
    with LineProgram(command, _ANSWER_S) as program:
        yield program


@contextmanager
def _jvm(stage: ResumeStage, cgroup: MemoryCgroup) -> Iterator[Resumed]:
    heap_bytes = stage.sizes.program_bytes - _JVM_BYTES
    count = (heap_bytes - _YOUNG_BYTES) // (_VALUE_BYTES + _JAVA_BESIDE_BYTES)
    options = ["-XX:+UseSerialGC", "-XX:-UsePerfData", f"-Xmx{heap_bytes}", f"-Xmn{_YOUNG_BYTES}"]
    command = within(cgroup, "java", *options, str(_JAVA), str(stage.base), str(count), str(_VALUE_BYTES))
    with LineProgram(command, _ANSWER_S) as program:
        yield program


Start = Callable[[ResumeStage, MemoryCgroup], AbstractContextManager[Resumed]]
PROGRAMS: Final[dict[str, Start]] = {"redis": _redis, "python": _python, "jvm": _jvm}
