"""The two swaps of a soak, turned on and off again: each in its own directory, one of them on a small file system."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from tmemfs.system import swapdev
from tmemfs.units import MIB
from tools.interrupts import uninterrupted, usual_signals
from tools.soak.plan import ORDINARY, SMALL

T = TypeVar("T")

CHECKOUT: Final = Path(__file__).resolve().parents[2]
#: The limit for a command, a write to a control file, or the end of a process; more is a hang.
HANG_S: Final = 240.0
_SWAP: Final = "1G"
_POOL_MAX: Final = "48M"
_FILE_SYSTEM_BYTES: Final = 96 * MIB


class Fault(Exception):
    """Something happened that must not; the soak ends."""


def bounded(what: str, call: Callable[[], T]) -> T:
    """The result of `call`, made in a thread: a daemon that hangs must not hang the soak. Raises Fault, and what `call` raises."""
    results, errors = list[T](), list[BaseException]()

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HANG_S)
    if errors:
        raise errors[0]
    if not results:
        raise Fault(f"{what} did not end within {HANG_S:.0f} s")
    return results[0]


@dataclass(frozen=True, slots=True)
class Place:
    """One swap: its places, its control files, and the commands on it. `more` are options of `up` beside size and limit."""

    name: str
    directory: Path
    size: str = _SWAP
    pool_max: str = _POOL_MAX
    more: tuple[str, ...] = ()

    @property
    def mountpoint(self) -> Path:
        """The mountpoint."""
        return self.directory / "mnt"

    @property
    def store(self) -> Path:
        """The directory of the backing: on the small swap, a file system of its own."""
        return self.directory / "store"

    @property
    def filler(self) -> Path:
        """The file that takes space from the backing."""
        return self.store / "filler"

    @property
    def log(self) -> Path:
        """The daemon's log."""
        return self.directory / "log"

    @property
    def options(self) -> list[str]:
        """The options of `up` and `mount`."""
        return [
            str(self.mountpoint), "--backing", str(self.store / "backing"), "--log", str(self.log),
            "--size", self.size, "--pool-max", self.pool_max, *self.more,
        ]  # fmt: skip

    def read(self, name: str) -> str:
        """The text of a control file. Raises OSError, Fault."""
        return bounded(f"reading control/{name} of {self.name}", lambda: (self.mountpoint / "control" / name).read_text())

    def flat(self, name: str) -> dict[str, str]:
        """A flat keyed control file."""
        return dict(line.split(" ", 1) for line in self.read(name).splitlines())

    def write(self, name: str, value: str) -> None:
        """Write a control file with one write(2). Raises OSError, Fault."""
        bounded(f"writing {value} to control/{name} of {self.name}", lambda: self._write(name, value))

    def _write(self, name: str, value: str) -> None:
        fd = os.open(self.mountpoint / "control" / name, os.O_WRONLY)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)

    def start(self, *arguments: str, tree: Path = CHECKOUT) -> subprocess.Popen[str]:
        """Start the command of the checkout at `tree`."""
        return subprocess.Popen(
            [sys.executable, "-m", "tmemfs", *arguments], cwd=tree, start_new_session=True,
            preexec_fn=usual_signals, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def command(self, *arguments: str) -> tuple[int, str]:
        """Exit code and output of the command. Raises Fault for a traceback or a hang."""
        return ended(self.start(*arguments))

    def up(self) -> None:
        """Turn it on. Raises Fault."""
        code, said = self.command("up", *self.options)
        # the `down` before this was refused, and a limit was changed meanwhile
        if "is up with other options" in said:
            code, said = self.command("up", str(self.mountpoint))
        if code:
            raise Fault(f"up of {self.name} ended with {code}: {said}")

    def logs(self) -> str:
        """Everything that its daemons logged."""
        return "".join(file.read_text(errors="replace") for file in sorted(self.directory.glob("log*")))

    def take_down(self) -> None:
        """Undo all of `up`, with --force and without the command if necessary."""
        pid = None
        with suppress(OSError, KeyError, ValueError, Fault):
            pid = int(self.flat("stat")["daemon_pid"])
        # the command first: by hand only what it could not do
        with suppress(Fault, OSError):
            if not self.command("down", str(self.mountpoint), "--force")[0] and not swapdev.is_mounted(self.mountpoint):
                return
        for device in swapdev.loop_devices_of(self.mountpoint / "swap"):
            with suppress(Exception):
                if swapdev.swap_on_device(device):
                    swapdev.swap_off(device)
                swapdev.detach(device)
        while swapdev.is_mounted(self.mountpoint):
            swapdev.unmount(self.mountpoint, lazy=True)
        if pid is not None:
            _end(pid)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output of a started command. Raises Fault for a traceback or a hang."""
    try:
        said, _ = process.communicate(timeout=HANG_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise Fault(f"{process.args!r} did not end within {HANG_S:.0f} s") from None
    if "Traceback" in said or "bug in tmemfs" in said:
        raise Fault(f"{process.args!r}: {said}")
    return process.returncode, said.strip()


def _end(pid: int) -> None:
    """Kill a daemon that was unmounted and did not end."""
    with suppress(ProcessLookupError):
        gone = os.pidfd_open(pid)
        try:
            if not select.select([gone], [], [], HANG_S / 8)[0]:
                signal.pidfd_send_signal(gone, signal.SIGKILL)
                select.select([gone], [], [], HANG_S / 8)
        finally:
            os.close(gone)


@contextmanager
def places(root: Path) -> Iterator[dict[str, Place]]:
    """Both swaps, on, below `root`; both are turned off in any case."""
    with ExitStack() as stack:
        root.chmod(0o755)  # hostile readers have to get through it
        made = {name: Place(name, root / name) for name in (SMALL, ORDINARY)}
        for place in made.values():
            place.mountpoint.mkdir(parents=True)
            place.store.mkdir()
        _make_file_system(root / "image", made[SMALL].store, stack)
        for place in made.values():
            # before `up`, which may be interrupted halfway
            stack.callback(place.take_down)
            place.up()
        yield made


def _make_file_system(image: Path, at: Path, stack: ExitStack) -> None:
    """A small ext4 that can run full, mounted `at`."""
    with image.open("wb") as file:
        file.truncate(_FILE_SYSTEM_BYTES)
    _run("mkfs.ext4", "-q", "-F", "-m", "0", "-J", "size=4", str(image))
    with uninterrupted():
        _run("mount", "-o", "loop", str(image), str(at))
        stack.callback(_run, "umount", str(at))


def _run(*command: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=HANG_S, check=False)
    if done.returncode:
        raise Fault(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
