"""A recording swap for the time of one command in a memory cgroup. Needs root.

Everything is undone in reverse order, each step even if one before it failed: swap off, loop device detached, unmounted, daemon
ended (which writes the trace), directory removed. A daemon that is still mounted is left alone, since it may hold pages, and its
process id is printed.

No other swap may be on: the kernel would distribute the pages over both, and the trace would have only a part of the workload.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from tmemfs.errors import Busy, Refused
from tmemfs.system import swapdev
from tools.cgroup import MemoryCgroup

_PRIORITY: Final = 100
_ENDED_S: Final = 60
_UNMOUNTED_S: Final = 10.0


def run(command: Sequence[str], limit_bytes: int) -> int:
    """Run `command` with at most `limit_bytes` of RAM; its exit code."""
    with MemoryCgroup("trace", limit_bytes) as cgroup:
        enter = f'echo $$ > {cgroup.tasks} && exec "$@"'
        return subprocess.run(["sh", "-c", enter, "sh", *command], check=False).returncode


@contextmanager
def recorded_swap(output: Path, size: str, pool_max: str) -> Iterator[None]:
    """A swap of `size`, whose requests are in `output` afterwards. Raises Busy, Refused."""
    if others := [entry.path for entry in swapdev.swap_entries()]:
        raise Busy(f"{' '.join(others)} is on and would take part of the pages: swapoff it first")
    with ExitStack() as undo:
        directory = Path(tempfile.mkdtemp(prefix="tmemfs-trace-"))
        undo.callback(_remove, directory)
        mountpoint = directory / "mnt"
        mountpoint.mkdir()
        daemon = _start(output, directory, size, pool_max)
        undo.callback(_end, daemon, mountpoint)
        _wait_ready(daemon)
        # runs before `_end`, which waits for the daemon: it ends when it is unmounted
        undo.callback(_unmount, mountpoint)
        device = swapdev.attach(mountpoint / "swap")
        undo.callback(swapdev.detach, device)
        swapdev.make_swap(device)
        swapdev.swap_on(device, _PRIORITY)
        undo.callback(swapdev.swap_off, device)
        yield


def _start(output: Path, directory: Path, size: str, pool_max: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tools.trace.daemon", str(output.absolute()), str(directory), size, pool_max]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True)


def _wait_ready(daemon: subprocess.Popen[str]) -> None:
    assert daemon.stdout is not None
    if daemon.stdout.readline() != "ready\n":
        raise Refused("the recording daemon did not start: see what it said above")


def _unmount(mountpoint: Path) -> None:
    """Unmount, as soon as the loop device has closed the image."""
    deadline = time.monotonic() + _UNMOUNTED_S
    while True:
        try:
            return swapdev.unmount(mountpoint)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _end(daemon: subprocess.Popen[str], mountpoint: Path) -> None:
    """Wait until the daemon has written the trace. Raises Refused if it fails."""
    try:
        code = daemon.wait(0.1 if swapdev.is_mounted(mountpoint) else _ENDED_S)
    except subprocess.TimeoutExpired:
        if swapdev.is_mounted(mountpoint):
            raise Refused(f"process {daemon.pid} still serves {mountpoint}: swapoff, losetup -d and umount by hand") from None
        daemon.kill()
        code = daemon.wait()
    if code:
        raise Refused(f"the recording daemon ended with {code}: there is no trace")


def _remove(directory: Path) -> None:
    """Remove what a session leaves, except for a mount that still exists."""
    # not rmtree: what is still mounted there would be emptied
    (directory / "backing").unlink(missing_ok=True)
    for left in (directory / "mnt", directory):
        left.rmdir()
