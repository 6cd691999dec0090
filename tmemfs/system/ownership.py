"""Files that hold memory contents or the log: opened only if nobody but root could prepare, read or replace them.

Knows what another user could do with a path. Knows nothing of what is in the file.

1. A file is examined through a descriptor that cannot read or write (O_PATH), and then the same file is opened through
   /proc/self/fd. Nobody can replace it between the two. A FIFO or a character device is refused without being opened: opening one
   may wait, rewind a tape or start a watchdog.
2. Each directory on the way to a backing belongs to root and is not writable by others, unless it is sticky (/tmp): there others
   can create files but not replace ours, and a file that they created is refused because of its owner.
3. A symbolic link as the last part of a path is never followed, except to a block device: /dev/disk/by-id and LVM name disks by
   links, in directories that passed rule 2.
4. A new file is created with O_EXCL, which follows no link either.

'Root' includes the user that runs this: `tmemfs demo` needs no root. An ACL that lets others in shows as permission of the group.

Sources: open(2), path_resolution(7), symlink(7), acl(5).
"""

from __future__ import annotations

import ctypes
import errno
import grp
import os
import pwd
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from tmemfs.errors import Refused

_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
#: As many symbolic links as the kernel follows (path_resolution(7)).
_MOST_LINKS: Final = 40
#: f_type of file systems whose files are RAM: tmpfs, ramfs, hugetlbfs (statfs(2)).
_IN_RAM: Final = {0x01021994: "tmpfs", 0x858458F6: "ramfs", 0x958458F6: "hugetlbfs"}
#: f_type of ext2, ext3 and ext4.
EXT4: Final = 0xEF53
_RAM_DISK: Final = re.compile(r"zram\d+|ram\d+")
_SYS_DEVICES: Final = Path("/sys/dev/block")
#: Larger than struct statfs of any architecture; it begins with f_type.
_STATFS_BYTES: Final = 256
_KINDS: Final = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISLNK, "a symbolic link"),
)  # fmt: skip
_libc = ctypes.CDLL(None, use_errno=True)


def backing_place(path: Path) -> Path:
    """`path` without symbolic links among its directories. Raises Refused if others could replace the file."""
    try:
        place = _trusted_directory(path.absolute().parent) / path.name
        # rule 3: the directory that the link leads to has to be trusted as well
        if place.is_symlink() and place.is_block_device():
            place = Path(os.path.realpath(place))
            place = _trusted_directory(place.parent) / place.name
    except OSError as error:
        raise _unreachable(path, error) from error
    return place


def create_backing(path: Path, flags: int) -> int:
    """A new file that only root may use, opened with `flags`. Raises OSError."""
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def open_backing(path: Path, flags: int) -> int:
    """The regular file or block device at `path`, opened with `flags`. Raises Refused for what others may use, and OSError."""
    pinned = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(pinned)
        if stat.S_ISBLK(found.st_mode):
            _refuse_shared_device(path, found)
            # without O_CREAT, O_EXCL refuses a device that is mounted or used as swap (open(2))
            flags |= os.O_EXCL
        else:
            _refuse_shared_file(path, found)
        refuse_ram(path, pinned, "--backing")
        # by the descriptor, not by the path: it may lead to another file by now (rule 1)
        return os.open(f"/proc/self/fd/{pinned}", flags | os.O_CLOEXEC)
    finally:
        os.close(pinned)


def open_log(path: Path) -> int:
    """The log at `path`, opened for appending; created if it is missing. Raises Refused for a file that another user prepared."""
    # O_NOCTTY: a terminal as log must not become the daemon's own, which would end with it
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY
    try:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o640)
    except FileExistsError:
        pass
    except OSError as error:
        raise _cannot_log(path, error) from error
    try:
        return _reopen_log(path, flags)
    except OSError as error:
        raise _cannot_log(path, error) from error


def refuse_ram(path: Path, fd: int, option: str) -> None:
    """Raise Refused if the file or device of `fd` is in RAM: writing pages there frees nothing."""
    found = os.fstat(fd)
    kind = _ram_device(found) if stat.S_ISBLK(found.st_mode) else _IN_RAM.get(file_system(fd))
    if kind:
        raise Refused(f"{path} is in RAM ({kind}), which would free nothing: give another {option}, on a disk")


def _trusted_directory(directory: Path) -> Path:
    """`directory` without symbolic links. Raises Refused unless only root can change where each of its parts leads."""
    # part by part instead of realpath(3): every directory and every link on the way is checked, not only the last
    here, left, links = Path("/"), list(reversed(directory.parts[1:])), 0
    _refuse_shared_directory(here)
    while left:
        name = left.pop()
        if name == "..":
            here = here.parent
            continue
        found = os.lstat(here / name)
        if not stat.S_ISLNK(found.st_mode):
            here /= name
            _refuse_shared_directory(here)
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        # the owner of a link can change where it leads, in a sticky directory too
        if not _is_trusted(found):
            raise _can_replace(here / name, found)
        target = Path(os.readlink(here / name))
        if target.is_absolute():
            here = Path("/")
        # a link's own parts come before what is left
        left += reversed([part for part in target.parts if part != "/"])
    return here


def _refuse_shared_directory(directory: Path) -> None:
    found = os.stat(directory)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not _is_trusted(found):
        raise _can_replace(directory, found)
    if found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX:
        raise Refused(
            f"{directory} may be written to by others, who could replace the backing: "
            f"run 'chmod go-w {directory}' or give another --backing"
        )


def _refuse_shared_file(path: Path, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise Refused(f"{path} is a directory: give the path of a file in it, for example {path / 'backing'}")
    if stat.S_ISLNK(found.st_mode):
        raise Refused(f"{path} is a symbolic link, which is not followed: give the path that it leads to as --backing")
    if not stat.S_ISREG(found.st_mode):
        raise Refused(f"{path} is {_kind(found)}: give a file or a block device as --backing")
    # the advice is not 'chown' or 'chmod': a process that has the file open could still read it
    instead = "move it away, then tmemfs creates one that only root may use, or give another --backing"
    if not _is_trusted(found):
        raise Refused(f"{path} belongs to {_user(found)}, who could read what is swapped out: {instead}")
    if found.st_mode & 0o077:
        raise Refused(f"{path} may be used by others (mode {stat.S_IMODE(found.st_mode):04o}): {instead}")
    if found.st_nlink > 1:
        raise Refused(f"{path} has {found.st_nlink} names, one of which may be another user's: {instead}")


def _refuse_shared_device(path: Path, found: os.stat_result) -> None:
    """Raise Refused if others than root and the group 'disk', to which udev gives disks, may use the device."""
    if not _is_trusted(found):
        raise Refused(f"{path} belongs to {_user(found)}: run 'chown root {path}' or give another --backing")
    is_open_to_group = found.st_mode & 0o070 and found.st_gid not in _disk_groups()
    if found.st_mode & 0o007 or is_open_to_group:
        mode = f"mode {stat.S_IMODE(found.st_mode):04o}"
        raise Refused(f"{path} may be used by others ({mode}): run 'chmod 600 {path}' or give another --backing")


def _reopen_log(path: Path, flags: int) -> int:
    pinned = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(pinned)
        if not stat.S_ISREG(found.st_mode):
            raise Refused(f"the log {path} is {_kind(found)}: give the path of a file as --log")
        if not _is_trusted(found) or found.st_nlink > 1:
            raise Refused(f"the log {path} may be another user's file ({_user(found)}): move it away or give another --log")
        if found.st_mode & _OTHERS_WRITE:
            raise Refused(f"the log {path} may be written to by others: run 'chmod go-w {path}' or give another --log")
        return os.open(f"/proc/self/fd/{pinned}", flags)
    finally:
        os.close(pinned)


def _ram_device(found: os.stat_result) -> str | None:
    """The kind of RAM that a block device is, or that the file of a loop device is in; None for a disk."""
    device = _SYS_DEVICES / f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
    # any part of the path: a partition lies below its disk
    disk = next((part for part in Path(os.path.realpath(device)).parts if _RAM_DISK.fullmatch(part)), None)
    if disk:
        return disk
    with suppress(OSError):
        file = (device / "loop" / "backing_file").read_bytes().removesuffix(b"\n")
        fd = os.open(file, os.O_PATH | os.O_CLOEXEC)
        try:
            kind = _IN_RAM.get(file_system(fd))
        finally:
            os.close(fd)
        return kind and f"a file on {kind}"
    return None


def file_system(fd: int) -> int:
    """f_type of the file system of `fd`, 0 if it is unknown."""
    # os.fstatvfs does not return the type
    found = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.fstatfs(fd, found):
        return 0
    return ctypes.c_long.from_buffer(found).value & 0xFFFFFFFF


def _is_trusted(found: os.stat_result) -> bool:
    return found.st_uid in (0, os.geteuid())


def _disk_groups() -> tuple[int, ...]:
    with suppress(KeyError):
        return 0, grp.getgrnam("disk").gr_gid
    return (0,)


def _can_replace(place: Path, found: os.stat_result) -> Refused:
    return Refused(f"{place} belongs to {_user(found)}, who could replace the backing: give another --backing")


def _user(found: os.stat_result) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(found.st_uid).pw_name
    return f"user {found.st_uid}"


def _kind(found: os.stat_result) -> str:
    return next((name for test, name in _KINDS if test(found.st_mode)), "not a file")


def _unreachable(path: Path, error: OSError) -> Refused:
    if error.errno == errno.ENOENT:
        return Refused(f"{path.parent} does not exist: create it (mkdir -p {path.parent}) or give another --backing")
    return Refused(f"cannot use {path} ({error.strerror}): give another --backing")


def _cannot_log(path: Path, error: OSError) -> Refused:
    return Refused(f"cannot write the log {path} ({error.strerror}): give another --log")
