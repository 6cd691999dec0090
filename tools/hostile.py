"""What unprivileged processes can do to the page path and to the daemon's memory through the control files.

    python -m tools.hostile loads [--readers 8] [--rounds 5] [--seconds 2] [--loop]
    python -m tools.hostile handles [--count 20000] [--loop]

`loads` measures loads of pages in RAM, one by one (preads of 4 KiB, O_DIRECT, of the image or a loop device over it), in three
situations: alone; next to readers of a tmpfs; and next to readers of the control files. Any busy process takes CPU from everything
else, so the third is compared with the second. `handles` opens files, reads a part of each, then all of it, and closes them at once
while pages are loaded. It prints how much memory of the daemon that takes. Both mount a tmemfs of their own, without swap. Need
root.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import resource
import signal
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Final

from tests.mounted import Place, directory_for_all, mounted
from tests.parts import page_of
from tmemfs.units import PAGE_BYTES

NOBODY: Final = 65534
_PAGES: Final = 8192
_SETTLE_S: Final = 0.3


@contextmanager
def unprivileged(count: int, work: Callable[[], None]) -> Iterator[list[int]]:
    """`count` processes of the user nobody that do `work` until the end of the block."""
    pids = []
    for _ in range(count):
        pid = os.fork()
        if not pid:
            with suppress(BaseException):
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                work()
            os._exit(0)
        pids.append(pid)
    try:
        yield pids
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)


def ask_everything(directory: Path) -> None:
    """Do what an ordinary user can do with every file, for ever."""
    while True:
        for name in os.listdir(directory):
            path = directory / name
            with suppress(OSError):
                os.stat(path)
                os.statvfs(path)
                os.access(path, os.R_OK)
                fd = os.open(path, os.O_RDONLY)
                try:
                    while os.read(fd, 1 << 16):
                        pass
                    os.lseek(fd, 0, os.SEEK_SET)
                    os.read(fd, 10)
                finally:
                    os.close(fd)
            with suppress(OSError):
                os.stat(directory / f"{name}.{random.random()}")
            with suppress(OSError):
                os.getxattr(path, "user.nothing")


def loads_us(image: Path, seconds: float) -> list[float]:
    """The times of loads of one page each, from RAM, in microseconds."""
    fd = os.open(image, os.O_RDONLY | os.O_DIRECT)
    found: list[float] = []
    try:
        with mmap.mmap(-1, PAGE_BYTES) as page:
            end = time.perf_counter() + seconds
            while (begun := time.perf_counter()) < end:
                os.preadv(fd, [page], random.randrange(_PAGES) * PAGE_BYTES)
                found.append((time.perf_counter() - begun) * 1e6)
    finally:
        os.close(fd)
    return found


def cpu_s(pid: int) -> float:
    """CPU time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def store(image: Path) -> None:
    """Store pages that compress by half."""
    fd = os.open(image, os.O_WRONLY)
    try:
        for first in range(0, _PAGES, 64):
            os.pwrite(fd, b"".join(page_of("half", first + at) for at in range(64)), first * PAGE_BYTES)
    finally:
        os.close(fd)


@contextmanager
def loop_device(image: Path) -> Iterator[Path]:
    """A loop device over `image`."""
    made = subprocess.run(["losetup", "--find", "--show", "--direct-io=on", image], capture_output=True, text=True, check=True)
    device = made.stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def compare_loads(place: Place, file: Path, decoy: Path, readers: int, rounds: int, seconds: float) -> None:
    """Print p50 and p99 of loads from `file` for each round, and the medians."""
    store(place.image)
    asked = {"alone": None, "next to readers of a tmpfs": decoy, "next to readers of control files": place.mountpoint / "control"}
    p50s: dict[str, list[float]] = {kind: [] for kind in asked}
    pid = place.pid
    for _ in range(rounds):
        for kind, directory in asked.items():
            with unprivileged(readers if directory else 0, lambda directory=directory: ask_everything(directory)):  # type: ignore[misc]
                time.sleep(_SETTLE_S)
                before, began = cpu_s(pid), time.perf_counter()
                times = sorted(loads_us(file, seconds))
                busy = (cpu_s(pid) - before) / (time.perf_counter() - began)
            p50s[kind].append(times[len(times) // 2])
            print(f"{kind:32} {len(times):7} loads  p50 {p50s[kind][-1]:7.1f} us  p99 {times[len(times) * 99 // 100]:8.1f} us  "
                  f"max {times[-1] / 1000:6.1f} ms  daemon's CPU {busy:4.2f}")  # fmt: skip
    medians = {kind: statistics.median(found) for kind, found in p50s.items()}
    *others, last = medians
    for kind in others:
        ratio = medians[last] / medians[kind]
        print(f"p50 {last}: {medians[last]:.1f} us, {ratio:.2f} times that {kind} ({medians[kind]:.1f})")


def names_for_others(place: Place) -> list[str]:
    """Paths of the control files that everybody may read."""
    return [entry.path for entry in os.scandir(place.mountpoint / "control") if entry.stat().st_mode & stat.S_IROTH]


def use_many(names: list[str], count: int, tell: int, go: int) -> None:
    """Open `count` files, read a part of each, read each to its end, close them all; write a byte to `tell` after each step."""
    fds = [os.open(names[at % len(names)], os.O_RDONLY) for at in range(count)]
    os.write(tell, b".")
    os.read(go, 1)
    for fd in fds:
        os.read(fd, 100)
    os.write(tell, b".")
    os.read(go, 1)
    for fd in fds:
        while os.read(fd, 1 << 16):
            pass
    os.write(tell, b".")
    os.read(go, 1)
    for fd in fds:
        os.close(fd)
    os.write(tell, b".")
    os.read(go, 1)


def open_many(place: Place, file: Path, count: int) -> None:
    """Print how much memory of the daemon `count` handles take, and the times of loads from `file` while they are closed."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    processes = -(-count // (most - 100))
    names = names_for_others(place)
    store(place.image)
    place.wait_for_spare()
    told, tell = os.pipe()
    wait, go = os.pipe()
    before, began = place.number("resident_anon"), time.perf_counter()
    with unprivileged(processes, lambda: use_many(names, count // processes, tell, wait)):
        for step in ("open", "read in part", "read to the end", "closed"):
            for _ in range(processes):
                os.read(told, 1)
            took = place.number("resident_anon") - before
            print(f"{time.perf_counter() - began:7.1f} s  {count} files {step:16} {took / 1e6:6.2f} MB more of the daemon's memory")
            os.write(go, b"." * processes)
            if step == "read to the end":
                times = loads_us(file, 3)
                print(f"{'':11}loads while they are closed: p50 {statistics.median(times):.1f} us, max {max(times) / 1000:.1f} ms")


def main() -> int:
    """Run the command that is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.hostile", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    loads = commands.add_parser("loads")
    loads.add_argument("--readers", type=int, default=8)
    loads.add_argument("--rounds", type=int, default=5)
    loads.add_argument("--seconds", type=float, default=2)
    handles = commands.add_parser("handles")
    handles.add_argument("--count", type=int, default=20_000)
    for command in (loads, handles):
        command.add_argument("--loop", action="store_true", help="load from a loop device, as a swap does")
    a = parser.parse_args()
    with directory_for_all() as directory, tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        os.chmod(shm, 0o755)
        with mounted(directory) as place:
            decoy = Path(shm)
            for name in names_for_others(place):
                (decoy / os.path.basename(name)).write_bytes(Path(name).read_bytes())
            with loop_device(place.image) if a.loop else nullcontext(place.image) as file:
                if a.command == "handles":
                    open_many(place, file, a.count)
                else:
                    compare_loads(place, file, decoy, a.readers, a.rounds, a.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
