"""A daemon's own mount: its record, the loop devices over its image, and how it is unmounted.

For the process that serves the mount, so nothing here asks the mount anything: the answer would have to come from this process.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from tmemfs.errors import Refused
from tmemfs.system import runtime, swapdev
from tmemfs.system.runtime import MountRecord


def record_of(mountpoint: Path, version: str, options: dict[str, str]) -> MountRecord:
    """The record of the mount at `mountpoint` that this process serves. Raises Refused."""
    place = swapdev.resolved(mountpoint)
    mount = swapdev.mount_at(place)
    started = runtime.process_started(os.getpid())
    if mount is None or started is None:
        raise Refused(f"{place} was unmounted while it was being mounted: try again")
    return MountRecord(os.fspath(place), os.getpid(), started, runtime.boot_id(), mount.device, version, options)


def forget(record: MountRecord) -> None:
    """Drop the record of a mount that has ended, unless a command works on it, which then drops it itself."""
    # an error leaves a stale record, which the next command drops
    with suppress(OSError, Refused):
        # read again: it has the loop device since, and another daemon may have taken the mountpoint
        last = runtime.read_record(Path(record.mountpoint))
        if last and (last.pid, last.started) == (record.pid, record.started):
            runtime.drop_record(last, is_locked=False)


def loops_of_own(mountpoint: Path, daemon: int) -> list[str]:
    """Loop devices over the image of process `daemon`, also after its mount was detached."""
    # not by the file behind the loop device (swapdev.file_behind): the kernel would ask this process, which waits for the answer
    record, image = _own_record(mountpoint, daemon), os.fspath(swapdev.resolved(mountpoint) / "swap")
    own = (record.loop, record.diskseq) if record and record.diskseq else None
    return [loop.device for loop in swapdev.loop_devices() if loop.path == image or (loop.device, loop.diskseq) == own]


def unmount_own(mountpoint: Path, daemon: int) -> None:
    """Unmount what process `daemon` serves at `mountpoint`, and nothing else that is mounted there by now. Raises OSError."""
    record, mount = _own_record(mountpoint, daemon), swapdev.mount_at(mountpoint)
    if record and (mount is None or mount.device != record.device):
        raise OSError(errno.EINVAL, "it is not mounted there any more")
    swapdev.unmount(mountpoint)


def _own_record(mountpoint: Path, daemon: int) -> MountRecord | None:
    """The record of process `daemon`, None if none was written (a test or a tool started it)."""
    try:
        record = runtime.read_record(swapdev.resolved(mountpoint))
    except Refused:
        return None
    return record if record and record.pid == daemon and record.daemon_lives else None
