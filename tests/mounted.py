"""A tmemfs that is mounted, or up as swap, for the time of a test, and gone afterwards whatever happened."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.waiting import HANG_S
from tests.waiting import readable as readable  # these two are looked for here by most tests
from tests.waiting import wait_until as wait_until
from tmemfs.system import swapdev
from tmemfs.system.kernel_settings import KernelSettings

TMEMFS: Final = (sys.executable, "-m", "tmemfs")
#: After that a mount that is still in use is detached.
_UNMOUNTED_S: Final = 60.0


def tmemfs(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    done = subprocess.run(
        [*TMEMFS, *map(str, arguments)], capture_output=True, text=True, errors="surrogateescape", timeout=HANG_S, check=False
    )
    assert not check or done.returncode == 0, f"tmemfs {arguments}: {done.returncode} {done.stdout} {done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tmemfs is, and what it says."""

    directory: Path

    @property
    def mountpoint(self) -> Path:
        """The mountpoint."""
        return self.directory / "mnt"

    @property
    def image(self) -> Path:
        """The swap image."""
        return self.mountpoint / "swap"

    @property
    def backing(self) -> Path:
        """The backing file."""
        return self.directory / "backing"

    @property
    def log(self) -> Path:
        """The daemon's log."""
        return self.directory / "log"

    @property
    def options(self) -> list[str | Path]:
        """What makes a daemon live here."""
        return [self.mountpoint, "--backing", self.backing, "--log", self.log]

    @property
    def pid(self) -> int:
        """The daemon's process."""
        return self.number("daemon_pid")

    def read(self, name: str) -> str:
        """Text of a control file, without the newline."""
        text = (self.mountpoint / "control" / name).read_text()
        assert text.endswith("\n")
        return text[:-1]

    @property
    def state(self) -> str:
        """The first line of control/state."""
        return self.read("state").splitlines()[0]

    def write(self, name: str, value: str) -> None:
        """Write a control file with one write(2). Raises OSError."""
        fd = os.open(self.mountpoint / "control" / name, os.O_WRONLY)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)

    def flat(self, name: str = "stat") -> dict[str, str]:
        """A flat keyed control file."""
        return dict(line.split(" ", 1) for line in self.read(name).splitlines())

    def number(self, key: str) -> int:
        """One figure of control/stat."""
        return int(self.flat()[key])

    def wait_for_spare(self) -> None:
        """Wait until the spare worker is ready; the figures of memory count it, too."""
        wait_until(lambda: self.number("worker_spare_pid"))

    def end(self) -> None:
        """Undo everything that may be left, however far it got."""
        for device in swapdev.loop_devices_of(self.image):
            with suppress(Exception):
                if swapdev.swap_on_device(device):
                    swapdev.swap_off(device)
                swapdev.detach(device)
        ended = None
        with suppress(OSError, KeyError):
            ended = os.pidfd_open(self.pid)
        deadline = time.monotonic() + _UNMOUNTED_S
        while swapdev.is_mounted(self.mountpoint):
            with suppress(OSError):
                swapdev.unmount(self.mountpoint, lazy=time.monotonic() > deadline)
            time.sleep(0.02)
        with suppress(Exception), closing(KernelSettings()) as settings:  # of a daemon that was killed
            settings.restore_leftovers()
        if ended is not None:
            readable(ended)
            os.close(ended)


@contextmanager
def directory_for_all() -> Iterator[Path]:
    """A directory that every user can reach: those of pytest are root's alone."""
    with tempfile.TemporaryDirectory(prefix="tmemfs-") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


@contextmanager
def mounted(directory: Path, *options: str, size: str = "256M", pool_max: str = "64M") -> Iterator[Place]:
    """A mount, without swap."""
    with place_for("mount", directory, "--size", size, "--pool-max", pool_max, *options) as place:
        yield place


@contextmanager
def swap_up(directory: Path, *options: str, size: str = "4G", pool_max: str = "512M") -> Iterator[Place]:
    """An active swap."""
    with place_for("up", directory, "--size", size, "--pool-max", pool_max, *options) as place:
        yield place


@contextmanager
def place_for(command: str, directory: Path, *options: str) -> Iterator[Place]:
    """A place where `tmemfs COMMAND` ran; undone at the end, and nothing logged there as a bug."""
    place = Place(directory)
    place.mountpoint.mkdir()
    try:
        tmemfs(command, *place.options, *options)
        yield place
    finally:
        place.end()
        log = place.log.read_text() if place.log.exists() else ""
    assert "bug in tmemfs" not in log and "Traceback" not in log, log
