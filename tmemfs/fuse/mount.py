"""Mounting without libfuse's help: /dev/fuse and mount(2), so that the descriptor is ours to read, and to keep.

The kernel sends INIT once, at the mount. It is read here, so that each worker can play it to its own pyfuse3.

Source: mount(2), Documentation/filesystems/fuse.rst, fs/fuse/dev.c (fuse_notify).
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tmemfs.errors import Refused
from tmemfs.fuse.wire import RESEND

FUSE_DEVICE: Final = Path("/dev/fuse")
_MS_NOSUID, _MS_NODEV = 2, 4
#: The kernel refuses a read into less (FUSE_MIN_READ_BUFFER).
_READ_BYTES: Final = 8192
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Device:
    """/dev/fuse of a mount, and INIT, the first request on it.

    `resends`: the kernel hands unanswered requests out again when it is asked to.
    """

    fd: int
    init: bytes
    resends: bool


def mount_fuse(mountpoint: Path) -> Device:
    """Mount a FUSE file system at `mountpoint`. Raises Refused, OSError."""
    try:
        fd = os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # not the module's fault
        raise Refused(f"cannot open {FUSE_DEVICE} ({error.strerror}): load the fuse module (modprobe fuse), as root") from error
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    if _libc.mount(b"tmemfs", os.fsencode(mountpoint), b"fuse.tmemfs", _MS_NOSUID | _MS_NODEV, options.encode()):
        number = ctypes.get_errno()
        os.close(fd)
        raise Refused(f"cannot mount at {mountpoint} ({os.strerror(number)}): run as root, on an empty directory")
    try:
        # Before INIT is read: nothing is to be handed out again then.
        resends = _resends(fd)
        return Device(fd, os.read(fd, _READ_BYTES), resends)
    except BaseException:
        os.close(fd)
        raise


def _resends(fd: int) -> bool:
    try:
        os.write(fd, RESEND)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True
