"""Mounts for benchmarks: started by the command, read through the control files, removed at the end in any case."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tmemfs.errors import Refused
from tmemfs.system import swapdev

_COMMAND = (sys.executable, "-m", "tmemfs")
#: The limit for the end of what was started.
_DOWN_S: Final = 60.0
_POLL_S: Final = 0.1


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
        tasks = Path(f"/proc/{self.stat()['worker_pid']}/task")
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


@contextmanager
def mounted(directory: Path, name: str, *options: str) -> Iterator[Mount]:
    """A mount with a loop device, below `directory`."""
    mountpoint = directory / name
    mountpoint.mkdir()
    backing, log = directory / f"{name}.backing", directory / f"{name}.log"
    try:
        subprocess.run(
            [*_COMMAND, "mount", mountpoint, "--backing", backing, "--log", log, *options], check=True, stdout=subprocess.DEVNULL
        )
        device = swapdev.attach(mountpoint / "swap")
        yield Mount(mountpoint, device)
    finally:
        take_down(mountpoint)


def take_down(mountpoint: Path) -> None:
    """Run `tmemfs down` until nothing is left: a daemon whose `mount` was interrupted may mount a moment later."""
    deadline = time.monotonic() + _DOWN_S
    while True:
        done = subprocess.run([*_COMMAND, "down", mountpoint, "--force"], check=False, capture_output=True, text=True)
        if not done.returncode and not processes_with(os.fspath(mountpoint)):
            return
        if time.monotonic() > deadline:
            print(f"bench: {mountpoint} is left behind: {done.stderr.strip() or done.stdout.strip()}", file=sys.stderr)
            return
        time.sleep(_POLL_S)


def wait_ready(server: subprocess.Popen[bytes]) -> None:
    """Wait until a server of a mount says 'ready'. Raises Refused."""
    assert server.stdout
    ready, _, _ = select.select([server.stdout], [], [], 30)
    if not ready or server.stdout.readline() != b"ready\n":
        raise Refused("the server did not start: see what it printed")


def end_server(server: subprocess.Popen[bytes]) -> None:
    """Wait until it has ended, as it does by itself once it is unmounted."""
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    if server.stdout:
        server.stdout.close()


def unmount(mountpoint: Path) -> None:
    """Unmount what is mounted, detached if it stays in use."""
    # the loop device closes the file some time after it is detached
    deadline = time.monotonic() + 10
    while swapdev.is_mounted(mountpoint):
        with suppress(OSError):
            swapdev.unmount(mountpoint, lazy=time.monotonic() > deadline)
        time.sleep(0.02)


def processes_with(argument: str) -> tuple[int, ...]:
    """Processes except this one with `argument` in their command line: a daemon, and a program that watches it."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit() and int(place.name) != os.getpid():
            with suppress(OSError):
                if os.fsencode(argument) in (place / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(place.name))
    return tuple(sorted(found))
