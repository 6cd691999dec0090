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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from tmemfs.cli.control_io import read_stat
from tmemfs.cli.health import Attendant, look
from tmemfs.cli.targets import FS_TYPE, Target, elsewhere, find, is_mounted_for
from tmemfs.errors import Busy, Refused, TmemfsError
from tmemfs.system import memory_limits, runtime, swapdev
from tmemfs.system.proctext import parse_mounts
from tmemfs.units import format_size

#: A daemon truncates its backing when it ends, which can take seconds.
_DAEMON_ENDS_S: Final = 20.0
_POLL_S: Final = 0.02


def up(target: Target, priority: int, compare: Callable[[], None], start: Callable[[], None]) -> str:
    """Take the missing steps; returns what was found or done. Raises Refused, Busy.

    `start` mounts. `compare` is called if there is a mount already, and raises if its options are not those that were given.
    """
    mountpoint = target.mountpoint
    _refuse_foreign(mountpoint)
    if target.places:
        if target.is_dead:
            raise Busy(f"the daemon of {mountpoint} has gone: run 'tmemfs down {mountpoint}' first")
        if health := look(mountpoint):
            health.refuse_if_silent()
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


def down(target: Target, force: bool, progress: Callable[[int, int], None], say: Callable[[str], None] = lambda said: None) -> str:
    """Undo all of `up`; calls `progress` with the bytes left and in total. Raises Refused, Busy.

    `say` is told what it waits for, if the worker does not answer. With `force` such a worker is killed, and replaced.
    """
    _refuse_foreign(target.mountpoint)
    loops = target.loops()
    if target.is_nothing and not loops:
        return "nothing is up"
    _refuse_hidden(target)
    dead = target.is_dead
    lost = not dead and _has_lost_pages(target, loops, force)
    attendant = Attendant(target.mountpoint, force, say)

    def attend(left: int, used: int) -> None:
        attendant.attend()
        progress(left, used)

    # a dead daemon serves no page, so nothing can be swapped in that would need memory: no check, as with `force`
    for loop in loops:
        _turn_off(loop.device, force or dead or lost, attend)
    _unmount_and_wait(target)
    return "cleaned up after a daemon that had gone" if dead else "cleaned up after workers that had died" if lost else "down"


def _has_lost_pages(target: Target, loops: list[swapdev.Loop], force: bool) -> bool:
    """Whether no worker serves the pages any more. Raises Refused if that loses some, unless by `force`."""
    health = look(target.mountpoint)
    if health is None or not health.has_given_up:
        return False
    lost = sum(entry.used_bytes for loop in loops if (entry := swapdev.swap_on_device(loop.device)))
    if lost and not force:
        raise Refused(
            f"{format_size(lost)} are swapped out, and cannot be loaded: {health.why}. End what needs them, or use --force, after "
            "which the kernel ends each process that touches such a page"
        )
    return True


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
            # a worker that is stopped or hangs does not notice; its pages are in memory again by now
            Attendant(target.mountpoint, True, lambda said: None).attend()
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
    if not target.places and is_mounted_for(target):
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
    with suppress(TmemfsError, KeyError, ValueError, IndexError):
        return int(read_stat(target.places[0])["daemon_pid"])
    return None
