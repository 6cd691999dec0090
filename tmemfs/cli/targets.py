"""Targets: which mount a command is about, and what exists of it.

What belongs to a mount is found by the identity of the mount (its st_dev, its record), not by the path that leads to it: a bind
mount is the same mount, and a mount that was detached lazily or is in another namespace still has its daemon and its swap.

Asks no daemon anything that it might not answer.

Invariant: 1. What is done to a target is done under one lock (`of`), which belongs to the mountpoint in its record.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tmemfs.errors import Refused
from tmemfs.system import runtime, swapdev
from tmemfs.system.proctext import Mount, parse_mounts
from tmemfs.system.runtime import MountRecord
from tmemfs.units import format_size

FS_TYPE: Final = "fuse.tmemfs"
#: The inode of the image (fuse/namespace.py).
_IMAGE: Final = 2


@dataclass(frozen=True, slots=True)
class Target:
    """What exists of one mount. `mountpoint` is that of its record; `places` are all paths where it is mounted here."""

    mountpoint: Path
    record: MountRecord | None
    device: int | None
    places: tuple[Path, ...]

    @property
    def image(self) -> Path:
        """The swap image."""
        return self.mountpoint / "swap"

    @property
    def daemon(self) -> int | None:
        """The process that serves it, None if it has ended or is unknown."""
        return self.record.pid if self.record and self.record.daemon_lives else None

    @property
    def is_dead(self) -> bool:
        """Whether its daemon has ended."""
        # the record before the mount: a daemon that hangs does not answer, and is not dead
        if self.record:
            return not self.record.daemon_lives
        return not self.places or swapdev.mount_is_dead(self.places[0])

    @property
    def is_nothing(self) -> bool:
        """Whether nothing of it exists, except perhaps loop devices that a daemon left."""
        return not self.places and self.daemon is None

    def loops(self) -> list[swapdev.Loop]:
        """Loop devices over the image."""
        return [loop for loop in swapdev.loop_devices() if self._is_over_image(loop)]

    def _is_over_image(self, loop: swapdev.Loop) -> bool:
        """Whether the image is what the loop device is attached to."""
        # the sequence number says that it is the same attachment, so the record is enough, and needs no answer of the daemon
        if self.record and self.record.loop == loop.device and 0 < self.record.diskseq == loop.diskseq:
            return True
        here = self._paths_of_image()
        # what cannot be ours is not asked about: its daemon may hang
        if loop.path not in here and loop.path.rpartition("/")[2] != "swap":
            return False
        # the kernel knows the file while the daemon lives; without an answer the path has to do
        behind = swapdev.file_behind(loop.device)
        if behind and self.device is not None:
            return behind == (self.device, _IMAGE)
        return loop.path in here

    def _paths_of_image(self) -> set[str]:
        """The paths of the image in this namespace, and the one that it had, in case it is no longer mounted."""
        return {os.fspath(place / "swap") for place in self.places} | {os.fspath(self.image)}


@contextmanager
def of(mountpoint: Path, command: str) -> Iterator[Target]:
    """What exists at `mountpoint`, under its lock until the end of the block. Raises Refused."""
    while True:
        # the lock's name is only known from what is found, which may change until the lock is held: then try again
        canonical = find(mountpoint).mountpoint
        with runtime.locked(runtime.lock_of(canonical), f"tmemfs {command} {mountpoint}"):
            target = find(mountpoint)
            if target.mountpoint == canonical:
                _drop_stale(canonical)
                yield target
                return


def find(mountpoint: Path) -> Target:
    """What exists at `mountpoint` now. Asks no daemon anything."""
    # the records before the mounts: a mount is recorded after it is mounted, so a record without a mount is stale
    records = runtime.read_records()
    mounts = swapdev.mounts()
    place = swapdev.resolved(mountpoint)
    found = next((mount for mount in reversed(mounts) if mount.mountpoint == os.fspath(place)), None)
    records = [record for record in records if _is_of_something(record, mounts, records)]
    if found is None or found.kind != FS_TYPE:
        record = next((record for record in records if record.mountpoint == os.fspath(place)), None)
        if record is None or found is not None:
            return Target(place, None, None, ())
        return Target(place, record, record.device, tuple(_places(mounts, record.device)))
    places = tuple(_places(mounts, found.device))
    # device numbers are used again, so the record of a living daemon counts more than that of a dead one
    candidates = [record for record in records if record.device == found.device]
    record = max(candidates, key=lambda record: record.daemon_lives, default=None)
    return Target(Path(record.mountpoint) if record else places[0], record, found.device, places)


def _places(mounts: list[Mount], device: int) -> Iterator[Path]:
    return (Path(mount.mountpoint) for mount in mounts if mount.device == device and mount.kind == FS_TYPE)


def _is_of_something(record: MountRecord, mounts: list[Mount], records: list[MountRecord]) -> bool:
    """Whether anything still exists of what is recorded; if not, a daemon was killed and somebody cleaned up by hand."""
    if record.daemon_lives:
        return True
    # device numbers are used again: a mount of a living daemon is not what a dead one left
    is_anothers = any(other.device == record.device and other.daemon_lives for other in records)
    if not is_anothers and any(_places(mounts, record.device)):
        return True
    return (record.loop, record.diskseq) in {(loop.device, loop.diskseq) for loop in swapdev.loop_devices()}


def _drop_stale(canonical: Path) -> None:
    """Drop the records of mounts of which nothing exists."""
    # each under its own lock: another command may be about to mount there, and write a new one
    records = runtime.read_records()
    for record in records:
        if not _is_of_something(record, swapdev.mounts(), records):
            runtime.drop_record(record, is_locked=record.mountpoint == os.fspath(canonical))


def readable_at(mountpoint: Path) -> Path:
    """The path by which the control files of `mountpoint` can be read. Raises Refused if they cannot, with what is still on."""
    try:
        target = find(mountpoint)
    except (Refused, OSError):
        # only root can read records; an ordinary user has the path alone
        return mountpoint
    if target.places or target.record is None:
        return mountpoint
    through = Path(f"/proc/{target.daemon}/root{target.mountpoint}")
    # /proc/PID/root is only for processes that may trace the daemon; even root may lack that right in a container
    if is_mounted_for(target) and os.access(through.parent, os.X_OK):
        return through
    raise Refused(f"{elsewhere(target)}: run 'tmemfs down {target.mountpoint}' to end it")


def is_mounted_for(target: Target) -> bool:
    """Whether its daemon lives and has the mount in its own namespace, at the recorded path."""
    try:
        mounts = parse_mounts(Path(f"/proc/{target.daemon}/mountinfo").read_bytes())
    except OSError:
        return False
    uppermost = next((mount for mount in reversed(mounts) if mount.mountpoint == os.fspath(target.mountpoint)), None)
    return uppermost is not None and uppermost.device == target.device


def elsewhere(target: Target) -> str:
    """A description of a recorded mount that is not mounted in this namespace: its daemon and its swap."""
    entries = [entry for loop in target.loops() if (entry := swapdev.swap_on_device(loop.device))]
    on = "".join(
        f" and swap is on by {entry.path} ({format_size(entry.used_bytes)} of {format_size(entry.size_bytes)} used)"
        for entry in entries
    )
    daemon = f"but its daemon (process {target.daemon}) lives" if target.daemon else "its daemon has gone"
    return f"{target.mountpoint} is not mounted here, {daemon}{on}"
