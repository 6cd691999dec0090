"""Mounting without libfuse's help: /dev/fuse and mount(2), so that the descriptor is ours to read.

Source: mount(2), Documentation/filesystems/fuse.rst.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Final

from tmemfs.errors import Refused

FUSE_DEVICE: Final = Path("/dev/fuse")
_MS_NOSUID, _MS_NODEV = 2, 4
_libc = ctypes.CDLL(None, use_errno=True)


def mount_fuse(mountpoint: Path) -> int:
    """Mount a FUSE file system at `mountpoint`; gives the device's descriptor. Raises Refused."""
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
    return fd
