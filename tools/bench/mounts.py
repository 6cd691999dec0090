"""Mounts for benchmarks: started by the command, read through the control files, gone at the end whatever happened."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tmemfs.host import swapdev

_COMMAND = (sys.executable, "-m", "tmemfs")


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted image and the loop device on it."""

    mountpoint: Path
    device: str

    def stat(self) -> dict[str, str]:
        """control/stat or any flat keyed file."""
        return self.flat("stat")

    def flat(self, name: str) -> dict[str, str]:
        """A flat keyed control file."""
        lines = (self.mountpoint / "control" / name).read_text().splitlines()
        return dict(line.split(" ", 1) for line in lines)

    def write(self, name: str, value: str) -> None:
        """Write a control file."""
        (self.mountpoint / "control" / name).write_text(value)

    def cpu_s(self) -> float:
        """CPU time of all the daemon's threads."""
        tasks = Path(f"/proc/{self.stat()['daemon_pid']}/task")
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


@contextmanager
def mounted(directory: Path, name: str, *options: str) -> Iterator[Mount]:
    """A mount with a loop device, below `directory`."""
    mountpoint = directory / name
    mountpoint.mkdir()
    backing, log = directory / f"{name}.backing", directory / f"{name}.log"
    subprocess.run(
        [*_COMMAND, "mount", mountpoint, "--backing", backing, "--log", log, *options], check=True, stdout=subprocess.DEVNULL
    )
    try:
        device = swapdev.attach(mountpoint / "swap")
        yield Mount(mountpoint, device)
    finally:
        subprocess.run([*_COMMAND, "down", mountpoint, "--force"], check=False, stdout=subprocess.DEVNULL)
