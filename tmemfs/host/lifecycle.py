"""Up and down: the steps from nothing to a swap that is on, and back, each of which may already be done.

    up:    mount -> loop device -> swap header -> swap on       a step that fails undoes those of this call
    down:  swap off -> loop device detached -> unmounted -> daemon gone

`down` works from what it finds, so it also cleans up what a crashed daemon left.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from tmemfs.errors import Busy, Refused
from tmemfs.host import swapdev

_DAEMON_ENDS_S: Final = 20.0
_POLL_S: Final = 0.02
FS_TYPE: Final = "fuse.tmemfs"


def up(mountpoint: Path, priority: int, start: Callable[[], None]) -> str:
    """Take the steps that are missing; `start` mounts. Gives what was found or done. Raises Refused, Busy."""
    image = mountpoint / "swap"
    if swapdev.is_mounted(mountpoint):
        _refuse_foreign(mountpoint)
        if swapdev.mount_is_dead(mountpoint):
            raise Busy(f"the daemon of {mountpoint} has gone: run 'tmemfs down {mountpoint}' first")
        if any(swapdev.swap_on_device(device) for device in swapdev.loop_devices_of(image)):
            return "already up"
        _turn_on(image, priority)
        return "was mounted, swap is on now"
    if swapdev.loop_devices_of(image):
        raise Busy(f"a loop device is left from a daemon that has gone: run 'tmemfs down {mountpoint}' first")
    start()
    try:
        _turn_on(image, priority)
    except BaseException:
        with suppress(OSError, Refused):
            _unmount_and_wait(mountpoint)
        raise
    return "up"


def down(mountpoint: Path, force: bool, progress: Callable[[int, int], None]) -> str:
    """Undo all of `up`. `progress` is told the bytes left and in all. Raises Refused, Busy."""
    image = mountpoint / "swap"
    mounted = swapdev.is_mounted(mountpoint)
    devices = swapdev.loop_devices_of(image)
    if not mounted and not devices:
        return "nothing is up"
    dead = not mounted or swapdev.mount_is_dead(mountpoint)
    if mounted:
        _refuse_foreign(mountpoint)
    for device in devices:
        _turn_off(device, force or dead, progress)
    if mounted:
        _unmount_and_wait(mountpoint, lazy=dead)
    return "cleaned up after a daemon that had gone" if dead else "down"


def umount(mountpoint: Path) -> None:
    """Unmount only. Raises Busy while the image is used."""
    if not swapdev.is_mounted(mountpoint):
        raise Refused(f"nothing is mounted at {mountpoint}: see 'mount -t fuse.tmemfs' for what is")
    _refuse_foreign(mountpoint)
    devices = swapdev.loop_devices_of(mountpoint / "swap")
    if devices:
        raise Busy(f"{' '.join(devices)} uses the image: run 'tmemfs down {mountpoint}', which turns the swap off first")
    _unmount_and_wait(mountpoint, lazy=swapdev.mount_is_dead(mountpoint))


def _turn_on(image: Path, priority: int) -> None:
    found = swapdev.loop_devices_of(image)
    device = found[0] if found else swapdev.attach(image)
    try:
        swapdev.make_swap(device)
        swapdev.swap_on(device, priority)
    except BaseException:
        if not found:
            with suppress(Refused):
                swapdev.detach(device)
        raise


def _turn_off(device: str, force: bool, progress: Callable[[int, int], None]) -> None:
    entry = swapdev.swap_on_device(device)
    if entry:
        if not force:
            swapdev.refuse_if_too_full(entry)
        swapdev.swap_off(device, lambda left: progress(left, entry.used_bytes))
    swapdev.detach(device)


def _refuse_foreign(mountpoint: Path) -> None:
    kind = swapdev.mount_type(mountpoint)
    if kind != FS_TYPE:
        raise Refused(f"{mountpoint} is taken by a {kind} mount that is not ours: give another mountpoint")


def _unmount_and_wait(mountpoint: Path, lazy: bool = False) -> None:
    """Unmount, and wait until the daemon has let go of its backing."""
    daemon = None if lazy else _daemon_pidfd(mountpoint)
    deadline = time.monotonic() + _DAEMON_ENDS_S
    while True:
        try:
            swapdev.unmount(mountpoint, lazy)
            break
        except OSError as error:
            # the loop device lets go of the file a moment after it was detached
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise Busy(f"cannot unmount {mountpoint} ({error.strerror}): close what has files open there") from error
            time.sleep(_POLL_S)
    if daemon is not None:
        select.select([daemon], [], [], max(deadline - time.monotonic(), 0))
        os.close(daemon)


def _daemon_pidfd(mountpoint: Path) -> int | None:
    """A descriptor that becomes readable when the daemon has ended, even if nobody has waited for it yet."""
    with suppress(OSError):
        for line in (mountpoint / "control" / "stat").read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "daemon_pid":
                return os.pidfd_open(int(value))
    return None
