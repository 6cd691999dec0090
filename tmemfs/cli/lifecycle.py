"""Up and down: the steps from nothing to an active swap, and back. Any of the steps may already be done.

    up:    mount -> loop device -> swap header -> swap on       a step that fails undoes those of this call
    down:  swap off -> loop device detached -> unmounted -> daemon ended

`down` works from what it finds, so it also cleans up what a killed daemon left. What belongs to a mount is found by the identity of
the mount (its st_dev, its record), not by the path that leads to it: a bind mount is the same mount, and a mount that was detached
lazily or is in another namespace still has its daemon and its swap.

Invariants:
1. All steps for one mount run under one lock (`of`), which belongs to the mountpoint in its record.
2. A loop device is chosen and attached under a lock of the machine, and never while there is one over the same image.
3. The command reports 'down' and 'unmounted' after the daemon has ended, not before.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tmemfs.errors import Busy, Refused
from tmemfs.system import memory_limits, runtime, swapdev
from tmemfs.system.proctext import Mount, parse_mounts
from tmemfs.system.runtime import MountRecord
from tmemfs.units import format_size

#: A daemon truncates its backing when it ends, which can take seconds.
_DAEMON_ENDS_S: Final = 20.0
_POLL_S: Final = 0.02
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


def up(target: Target, priority: int, compare: Callable[[], None], start: Callable[[], None]) -> str:
    """Take the missing steps; returns what was found or done. Raises Refused, Busy.

    `start` mounts. `compare` is called if there is a mount already, and raises if its options are not those that were given.
    """
    mountpoint = target.mountpoint
    _refuse_foreign(mountpoint)
    if target.places:
        if target.is_dead:
            raise Busy(f"the daemon of {mountpoint} has gone: run 'tmemfs down {mountpoint}' first")
        compare()
        if any(swapdev.swap_on_device(loop.device) for loop in target.loops()):
            return "already up"
        _turn_on(target, priority)
        return "was mounted, swap is on now"
    refuse_taken(target)
    start()
    try:
        _turn_on(find(mountpoint), priority)
    except BaseException:
        # the first error is what the user has to know; the mount may stay, for `down`
        with suppress(OSError, Refused, Busy):
            _unmount_and_wait(find(mountpoint))
        raise
    return "up"


def refuse_taken(target: Target) -> None:
    """Raise Busy or Refused if nothing can be mounted there."""
    mountpoint = target.mountpoint
    _refuse_foreign(mountpoint)
    if target.places:
        raise Busy(f"{mountpoint} is taken by a mount: run 'tmemfs down {mountpoint}' first, or give another mountpoint")
    if target.daemon is not None:
        raise Busy(f"{elsewhere(target)}: run 'tmemfs down {mountpoint}' first, or give another mountpoint")
    if target.loops():
        raise Busy(f"a loop device is left from a daemon that has gone: run 'tmemfs down {mountpoint}' first")


def down(target: Target, force: bool, progress: Callable[[int, int], None]) -> str:
    """Undo all of `up`; calls `progress` with the bytes left and in total. Raises Refused, Busy."""
    _refuse_foreign(target.mountpoint)
    loops = target.loops()
    if target.is_nothing and not loops:
        return "nothing is up"
    _refuse_hidden(target)
    dead = target.is_dead
    # a dead daemon serves no page, so nothing can be swapped in that would need memory: no check, as with `force`
    for loop in loops:
        _turn_off(loop.device, force or dead, progress)
    _unmount_and_wait(target)
    return "cleaned up after a daemon that had gone" if dead else "down"


def umount(target: Target) -> None:
    """Unmount it everywhere. Raises Busy while the image is in use."""
    mountpoint = target.mountpoint
    _refuse_foreign(mountpoint)
    if target.is_nothing:
        raise Refused(f"nothing is mounted at {mountpoint}: see 'mount -t fuse.tmemfs' for what is")
    if loops := target.loops():
        devices = " ".join(loop.device for loop in loops)
        raise Busy(f"{devices} uses the image: run 'tmemfs down {mountpoint}', which turns the swap off first")
    _refuse_hidden(target)
    _unmount_and_wait(target)


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
    if _is_mounted_for(target) and os.access(through.parent, os.X_OK):
        return through
    raise Refused(f"{elsewhere(target)}: run 'tmemfs down {target.mountpoint}' to end it")


def _is_mounted_for(target: Target) -> bool:
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


def _turn_on(target: Target, priority: int) -> None:
    with runtime.locked(runtime.LOOP_DEVICES, f"tmemfs up {target.mountpoint}"):
        found = target.loops()
        device = found[0].device if found else swapdev.attach(target.image)
    try:
        # before the swap is on: from then on `down` may need it
        _keep_loop(target, device)
        swapdev.make_swap(device)
        swapdev.swap_on(device, priority)
    except BaseException:
        # only what this call attached
        if not found:
            with suppress(Refused):
                swapdev.detach(device)
        raise


def _keep_loop(target: Target, device: str) -> None:
    """Record the loop device."""
    # once the daemon is dead and its mount detached, nothing else says whose image the loop device is over
    loop = next((loop for loop in swapdev.loop_devices() if loop.device == device), None)
    if target.record and loop:
        runtime.write_record(target.record.with_loop(device, loop.diskseq))


def _turn_off(device: str, force: bool, progress: Callable[[int, int], None]) -> None:
    entry = swapdev.swap_on_device(device)
    if entry:
        if not force:
            swapdev.refuse_if_too_full(entry)
            elsewhere_bytes = swapdev.free_elsewhere_bytes(entry)
            memory_limits.refuse_if_overfull(swapdev.mounts(), entry.used_bytes, elsewhere_bytes)
        used = entry.used_bytes
        swapdev.swap_off(device, lambda left: progress(left, used))
    swapdev.detach(device)


def _refuse_foreign(mountpoint: Path) -> None:
    kind = swapdev.mount_type(mountpoint)
    if kind is not None and kind != FS_TYPE:
        raise Refused(f"{mountpoint} is taken by a {kind} mount that is not ours: give another mountpoint")


def _unmount_and_wait(target: Target) -> None:
    """Unmount it everywhere, wait until the daemon has ended, and remove its record. Raises Busy."""
    dead = target.is_dead
    # before the unmount: the daemon may end at once, and another process may then get its number
    daemon = None if dead else _pidfd(target)
    deadline = time.monotonic() + _DAEMON_ENDS_S
    try:
        # the upper mounts first
        for place in reversed(target.places):
            _unmount(place, target, deadline, lazy=dead)
        if daemon is not None:
            _wait_for_end(target, daemon, deadline)
    finally:
        if daemon is not None:
            os.close(daemon)
    # not if that failed: the record is how the next `down` finds the rest
    runtime.remove_record(target.mountpoint)


def _refuse_hidden(target: Target) -> None:
    """Raise Busy if a place cannot be unmounted because another mount lies over it. To be called before anything is changed."""
    for place in target.places:
        _is_uppermost(place, target)


def _is_uppermost(place: Path, target: Target) -> bool:
    """Whether it is still mounted at `place`. Raises Busy if another mount lies over it."""
    # umount2(2) takes a path, and unmounts what is uppermost there
    mount = swapdev.mount_at(place)
    if mount and mount.device != target.device:
        raise Busy(f"a {mount.kind} mount lies over {place}: unmount that first")
    return mount is not None


def _unmount(place: Path, target: Target, deadline: float, lazy: bool) -> None:
    while _is_uppermost(place, target):
        try:
            return swapdev.unmount(place, lazy)
        except OSError as error:
            # the loop device closes the file a moment after it was detached
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise Busy(f"cannot unmount {place} ({error.strerror}): close what has files open there") from error
            time.sleep(_POLL_S)


def _wait_for_end(target: Target, daemon: int, deadline: float) -> None:
    """Wait until the daemon has ended. Raises Busy if it does not by `deadline`."""
    # it ends when its mount is gone from every namespace; in its own namespace only it can unmount, which SIGTERM asks for
    if not target.places and _is_mounted_for(target):
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(daemon, signal.SIGTERM)
    # not select(2), which takes no descriptor above 1023
    ended = select.poll()
    ended.register(daemon, select.POLLIN)
    if not ended.poll(max(deadline - time.monotonic(), 0) * 1000):
        holders = " ".join(map(str, _holders(target))) or "files that are open there"
        raise Busy(
            f"{target.mountpoint} is unmounted here, but its daemon still runs: mount namespaces of other processes or open "
            f"files hold it ({holders}): end those processes, and try again"
        )


def _holders(target: Target) -> list[int]:
    """Processes in whose namespaces it is still mounted, one per namespace."""
    found: dict[str, int] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        # a process may have ended since the listing
        with suppress(OSError):
            if any(mount.device == target.device for mount in parse_mounts((directory / "mountinfo").read_bytes())):
                found.setdefault(os.readlink(directory / "ns" / "mnt"), int(directory.name))
    return sorted(found.values())


def _pidfd(target: Target) -> int | None:
    """A descriptor that becomes readable when the daemon has ended, even if its parent has not waited for it; None if unknown."""
    pid = target.daemon or _pid_from_control(target)
    if pid is None:
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _pid_from_control(target: Target) -> int | None:
    """The daemon's process by its own control files, for a mount without a record."""
    with suppress(OSError, ValueError, IndexError):
        text = (target.places[0] / "control" / "stat").read_text()
        return int(next(line.split(" ")[1] for line in text.split("\n") if line.startswith("daemon_pid ")))
    return None
