"""Up and down: the steps from nothing to a swap that is on, and back, each of which may already be done.

    up:    mount -> loop device -> swap header -> swap on       a step that fails undoes those of this call
    down:  swap off -> loop device detached -> unmounted -> daemon gone

`down` works from what it finds, so it also cleans up what a crashed daemon left. What belongs to a mount is found by what the mount
is (its st_dev, its record), not by the path that leads to it: a bind mount is the same mount, and a mount that was detached lazily
or lies in another namespace still has its daemon and its swap.

Invariants:
1. All of this for one mount runs under one lock (`of`), which belongs to the mountpoint in its record.
2. A loop device is chosen and attached under a lock of the machine, and never while there is one over the same image.
3. 'down' and 'unmounted' are said when the daemon has ended, and not before.
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

_DAEMON_ENDS_S: Final = 20.0
_POLL_S: Final = 0.02
FS_TYPE: Final = "fuse.tmemfs"
#: The inode of the image (fuse/namespace.py).
_IMAGE: Final = 2


@dataclass(frozen=True, slots=True)
class Target:
    """One mount: what there is of it. `mountpoint` is that of its record; `places` are all where it is mounted here."""

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
        """The process that serves it, if it is known to live."""
        return self.record.pid if self.record and self.record.daemon_lives else None

    @property
    def is_dead(self) -> bool:
        """Whether its daemon has gone."""
        if self.record:
            return not self.record.daemon_lives
        return not self.places or swapdev.mount_is_dead(self.places[0])

    @property
    def is_nothing(self) -> bool:
        """Whether there is nothing of it, but for loop devices that a daemon left."""
        return not self.places and self.daemon is None

    def loops(self) -> list[swapdev.Loop]:
        """Loop devices over the image."""
        return [loop for loop in swapdev.loop_devices() if self._is_over_image(loop)]

    def _is_over_image(self, loop: swapdev.Loop) -> bool:
        """The kernel knows which file is behind, while the daemon lives. Else the record does, or the path."""
        if self.record and self.record.loop == loop.device and 0 < self.record.diskseq == loop.diskseq:
            return True
        here = self._paths_of_image()
        if loop.path not in here and loop.path.rpartition("/")[2] != "swap":
            return False  # nothing is asked about what cannot be ours: another daemon may hang
        behind = swapdev.file_behind(loop.device)
        if behind and self.device is not None:
            return behind == (self.device, _IMAGE)
        return loop.path in here

    def _paths_of_image(self) -> set[str]:
        """By which the image is reached in this namespace; also the name that it had, should it be mounted no more."""
        return {os.fspath(place / "swap") for place in self.places} | {os.fspath(self.image)}


@contextmanager
def of(mountpoint: Path, command: str) -> Iterator[Target]:
    """What there is at `mountpoint`, or is called so, under the lock of it for as long as the block lasts. Raises Refused."""
    while True:
        canonical = find(mountpoint).mountpoint
        with runtime.locked(runtime.lock_of(canonical), f"tmemfs {command} {mountpoint}"):
            target = find(mountpoint)
            if target.mountpoint == canonical:
                _drop_stale(canonical)
                yield target
                return


def find(mountpoint: Path) -> Target:
    """What there is at `mountpoint` now. Asks nothing of any daemon."""
    records = runtime.read_records()  # before the mounts: what is recorded now is mounted then
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
    # a number is used again once what had it has gone, so a record of a daemon that lives counts more than one of a dead one
    candidates = [record for record in records if record.device == found.device]
    record = max(candidates, key=lambda record: record.daemon_lives, default=None)
    return Target(Path(record.mountpoint) if record else places[0], record, found.device, places)


def _places(mounts: list[Mount], device: int) -> Iterator[Path]:
    return (Path(mount.mountpoint) for mount in mounts if mount.device == device and mount.kind == FS_TYPE)


def _is_of_something(record: MountRecord, mounts: list[Mount], records: list[MountRecord]) -> bool:
    """Whether there still is anything of what is recorded: else a daemon was killed, and what it left was undone by hand."""
    if record.daemon_lives:
        return True
    # a device number is used again: a mount of a daemon that lives is not what a dead one has left
    is_anothers = any(other.device == record.device and other.daemon_lives for other in records)
    if not is_anothers and any(_places(mounts, record.device)):
        return True
    return (record.loop, record.diskseq) in {(loop.device, loop.diskseq) for loop in swapdev.loop_devices()}


def _drop_stale(canonical: Path) -> None:
    """Forget the mounts of which there is nothing. A record is only removed under its lock: a new one may take its place."""
    records = runtime.read_records()
    for record in records:
        if not _is_of_something(record, swapdev.mounts(), records):
            runtime.drop_record(record, is_locked=record.mountpoint == os.fspath(canonical))


def up(target: Target, priority: int, compare: Callable[[], None], start: Callable[[], None]) -> str:
    """Take the steps that are missing; gives what was found or done. Raises Refused, Busy.

    `start` mounts. `compare` is called where a mount is there already, and raises if that is not what is wanted.
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
        with suppress(OSError, Refused, Busy):
            _unmount_and_wait(find(mountpoint))
        raise
    return "up"


def refuse_taken(target: Target) -> None:
    """Raise Busy or Refused where nothing can be mounted."""
    mountpoint = target.mountpoint
    _refuse_foreign(mountpoint)
    if target.places:
        raise Busy(f"{mountpoint} is taken by a mount: run 'tmemfs down {mountpoint}' first, or give another mountpoint")
    if target.daemon is not None:
        raise Busy(f"{elsewhere(target)}: run 'tmemfs down {mountpoint}' first, or give another mountpoint")
    if target.loops():
        raise Busy(f"a loop device is left from a daemon that has gone: run 'tmemfs down {mountpoint}' first")


def down(target: Target, force: bool, progress: Callable[[int, int], None]) -> str:
    """Undo all of `up`. `progress` is told the bytes left and in all. Raises Refused, Busy."""
    _refuse_foreign(target.mountpoint)
    loops = target.loops()
    if target.is_nothing and not loops:
        return "nothing is up"
    _refuse_hidden(target)
    dead = target.is_dead
    for loop in loops:
        _turn_off(loop.device, force or dead, progress)
    _unmount_and_wait(target)
    return "cleaned up after a daemon that had gone" if dead else "down"


def umount(target: Target) -> None:
    """Unmount only, wherever it is mounted. Raises Busy while the image is used."""
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
    """Where the control files of `mountpoint` can be read. Raises Refused, with what is on, where a daemon has none to be seen."""
    try:
        target = find(mountpoint)
    except (Refused, OSError):  # records are for root: without them there is the path alone
        return mountpoint
    if target.places or target.record is None:
        return mountpoint
    through = Path(f"/proc/{target.daemon}/root{target.mountpoint}")
    # the link is for those alone who may trace the daemon: root may lack the right
    if _is_mounted_for(target) and os.access(through.parent, os.X_OK):
        return through
    raise Refused(f"{elsewhere(target)}: run 'tmemfs down {target.mountpoint}' to end it")


def _is_mounted_for(target: Target) -> bool:
    """Whether its daemon lives and has the mount in its own namespace, at the path that is recorded."""
    try:
        mounts = parse_mounts(Path(f"/proc/{target.daemon}/mountinfo").read_bytes())
    except OSError:
        return False
    uppermost = next((mount for mount in reversed(mounts) if mount.mountpoint == os.fspath(target.mountpoint)), None)
    return uppermost is not None and uppermost.device == target.device


def elsewhere(target: Target) -> str:
    """What is on of a mount that is recorded, and is not to be seen here."""
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
        _keep_loop(target, device)
        swapdev.make_swap(device)
        swapdev.swap_on(device, priority)
    except BaseException:
        if not found:
            with suppress(Refused):
                swapdev.detach(device)
        raise


def _keep_loop(target: Target, device: str) -> None:
    """Note the loop device: once the daemon is dead and its mount detached, nothing else says whose image it is over."""
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
    """Unmount it everywhere, wait until the daemon has let go of its backing, and forget it. Raises Busy."""
    dead = target.is_dead
    daemon = None if dead else _pidfd(target)
    deadline = time.monotonic() + _DAEMON_ENDS_S
    try:
        for place in reversed(target.places):
            _unmount(place, target, deadline, lazy=dead)
        if daemon is not None:
            _wait_for_end(target, daemon, deadline)
    finally:
        if daemon is not None:
            os.close(daemon)
    runtime.remove_record(target.mountpoint)


def _refuse_hidden(target: Target) -> None:
    """Raise Busy where a place cannot be unmounted, as something else lies over it; before anything is changed."""
    for place in target.places:
        _is_uppermost(place, target)


def _is_uppermost(place: Path, target: Target) -> bool:
    """Whether it is still mounted at `place`. Raises Busy if that is below another mount, which would be unmounted instead."""
    mount = swapdev.mount_at(place)
    if mount and mount.device != target.device:
        raise Busy(f"a {mount.kind} mount lies over {place}: unmount that first")
    return mount is not None


def _unmount(place: Path, target: Target, deadline: float, lazy: bool) -> None:
    while _is_uppermost(place, target):
        try:
            return swapdev.unmount(place, lazy)
        except OSError as error:
            # the loop device lets go of the file a moment after it was detached
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise Busy(f"cannot unmount {place} ({error.strerror}): close what has files open there") from error
            time.sleep(_POLL_S)


def _wait_for_end(target: Target, daemon: int, deadline: float) -> None:
    """The daemon ends when its mount is nowhere any more. Where that is another namespace, it unmounts it itself, if asked to."""
    if not target.places and _is_mounted_for(target):
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(daemon, signal.SIGTERM)
    ended = select.poll()  # select(2) takes no descriptor above 1023
    ended.register(daemon, select.POLLIN)
    if not ended.poll(max(deadline - time.monotonic(), 0) * 1000):
        holders = " ".join(map(str, _holders(target))) or "files that are open there"
        raise Busy(
            f"{target.mountpoint} is unmounted here, but its daemon lives on: it is held by mount namespaces of processes "
            f"or by open files ({holders}): end them, and try again"
        )


def _holders(target: Target) -> list[int]:
    """Processes in whose namespace it is still mounted, one for each namespace."""
    found: dict[str, int] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(mount.device == target.device for mount in parse_mounts((directory / "mountinfo").read_bytes())):
                found.setdefault(os.readlink(directory / "ns" / "mnt"), int(directory.name))
    return sorted(found.values())


def _pidfd(target: Target) -> int | None:
    """A descriptor that becomes readable when the daemon has ended, even if nobody has waited for it yet."""
    pid = target.daemon or _pid_from_control(target)
    if pid is None:
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _pid_from_control(target: Target) -> int | None:
    """From the mount itself, where no record says it."""
    with suppress(OSError, ValueError, IndexError):
        text = (target.places[0] / "control" / "stat").read_text()
        return int(next(line.split(" ")[1] for line in text.split("\n") if line.startswith("daemon_pid ")))
    return None
