"""The file tier: extents in a sparse file or on a block device, read and written with O_DIRECT.

    offset            content
    0                 header block: MAGIC, then zeros
    4096              reserve: space that is allocated for cleaning when the file system is full; zeros
    2 MiB + n * 1 MiB extent n, of the layout of a segment (store/record.py)

The file is locked (flock) while it is in use, so a second daemon is refused. A file without our header is never written to, nor is
a device, unless its first and last 2 MiB are zeros. A file that others than root may read, write or replace is refused
(system/ownership.py), and so is one in RAM. Contents do not outlive the daemon: nothing is fsynced, and the file is truncated to
its header at start and end. The space of freed extents is given back: by holes in a file, by discards on a device.

Hard disks, LUKS without discards and file systems without holes cannot give space back. The tier finds that out at the start, when
there is nothing to lose, or at the first hole that is refused for good. From then on extents are only written again.

A load does not wait for a write, not even where the disk is busy with writes for long. On ext4 a write to blocks that are not
allocated keeps all reads of the file away until it has ended, so blocks are allocated before. A change of its blocks waits for the
writes under way (blocks.py). And a read leaves the time of the last access alone (O_NOATIME): to note it, ext4 may wait for its
journal.

Thread-safety: all methods may run at once. The descriptor is constant after construction; `can_discard` changes once, to False.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import stat
import struct
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Final

from tmemfs.errors import BackingFull, Busy, Refused, TierError
from tmemfs.system.memory import allocate, direct_alignment, punch
from tmemfs.system.ownership import EXT4, backing_place, create_backing, file_system, open_backing, refuse_ram
from tmemfs.tiers.blocks import Blocks
from tmemfs.tiers.tier import Extent
from tmemfs.units import BLOCK_BYTES, SEGMENT_BYTES, format_size

log = logging.getLogger(__name__)

MAGIC: Final = b"tmemfs backing, format 1\n"
#: Header and reserve. The reserve holds one segment and what the file system needs to write it.
BACKING_HEADER_BYTES: Final = 2 * SEGMENT_BYTES
_BLKGETSIZE64: Final = 0x80081272
_BLKDISCARD: Final = 0x1277
#: Errors that mean: no hole here, and no allocation without a write, ever.
_NO_HOLES: Final = frozenset((errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY))
_NO_SPACE: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


class FileTier:
    """Extents in the file or block device at `path`, which is created if it is not there. Raises Refused, Busy.

    `adopt` makes one of a descriptor that another process has locked; what is in the file stays.
    """

    is_encrypted = False

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        path = backing_place(path)
        is_new = not os.path.lexists(path)
        self._fd = _create(path) if is_new else _open(path, os.O_RDWR)
        self.can_discard = True
        try:
            self._look_at_file()
            _lock(self._fd, path)
            self.capacity_bytes = _capacity(path, self._fd)
            # A device never grows; a file may, when space on its file system becomes free.
            self.most_extents = self.capacity_bytes // SEGMENT_BYTES if self.is_device else None
            self._claim(path, is_new)
            self.sector_bytes = _sector_bytes(self._fd)
            self._reserve_used = True
            self._keep_reserve()
        except BaseException:
            os.close(self._fd)
            if is_new:
                with suppress(FileNotFoundError):
                    path.unlink()
            raise

    @classmethod
    def adopt(cls, path: Path, fd: int, capacity_bytes: int, can_discard: bool) -> FileTier:
        """The tier that has `fd` in another process, which found out the rest."""
        tier = cls.__new__(cls)  # the usual way claims the file, and empties it
        tier.name = str(path)
        tier._fd, tier.capacity_bytes, tier.can_discard = fd, capacity_bytes, can_discard
        tier._look_at_file()
        tier.most_extents = capacity_bytes // SEGMENT_BYTES if tier.is_device else None
        tier.sector_bytes = _sector_bytes(fd)
        tier._reserve_used = not can_discard  # where it was used meanwhile, its second use frees nothing
        return tier

    def _look_at_file(self) -> None:
        self.is_device = stat.S_ISBLK(os.fstat(self._fd).st_mode)
        self._allocates = not self.is_device and file_system(self._fd) == EXT4
        self._blocks = Blocks()

    @property
    def fd(self) -> int:
        """The locked descriptor of the file or device."""
        return self._fd

    def write(self, extent: Extent, data: memoryview, sequence: int, for_cleaning: bool = False) -> None:
        """Write `data` straight from the frame; if the file system is full, cleaning may use the reserve."""
        try:
            self._write(extent, data)
        except BackingFull:
            # cleaning frees more space than it writes, so without the reserve a full file system would stay full
            if not for_cleaning or not self._use_reserve():
                raise
            self._write(extent, data)

    def _write(self, extent: Extent, data: memoryview) -> None:
        position = BACKING_HEADER_BYTES + extent * SEGMENT_BYTES
        try:
            if self._allocates:
                self._allocate(position, len(data))
            with self._blocks.kept():
                while data:
                    written = os.pwrite(self._fd, data, position)
                    # 0 is no error to the kernel, and would repeat for ever
                    if not written:
                        raise BackingFull(f"{self.name} accepts no more data: free space on its file system or use a larger one")
                    data = data[written:]
                    position += written
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise BackingFull(f"{self.name} is full: free space on its file system or lower backing.max") from error
            raise TierError(f"writing to {self.name} failed ({error.strerror}): check the disk") from error

    def _allocate(self, position: int, length: int) -> None:
        """Allocate the blocks of a write, if there are none; those that are there keep what they hold. Raises OSError."""
        try:
            with self._blocks.changed():
                allocate(self._fd, position, length)
        except OSError as error:
            if error.errno not in _NO_HOLES:
                raise
            self._allocates = False  # ext2 and ext3 may know no allocation without a write

    def read(self, extent: Extent, offset: int, into: memoryview, sequence: int) -> None:
        """Fill `into`; raises TierError if the file ends too early."""
        position = BACKING_HEADER_BYTES + extent * SEGMENT_BYTES + offset
        try:
            while into:
                count = os.preadv(self._fd, [into], position)
                if not count:
                    raise TierError(f"{self.name} ends before extent {extent}: something else truncated it; check the disk")
                into = into[count:]
                position += count
        except OSError as error:
            raise TierError(f"reading from {self.name} failed ({error.strerror}): check the disk") from error

    def discard(self, extents: tuple[Extent, ...]) -> None:
        """Free the space of `extents`; does nothing where that is impossible."""
        if not self.can_discard:
            return
        # one hole per run of neighbours: the cost of a hole is mostly that of the call
        ordered = sorted(extents)
        ends = [at for at, (left, right) in enumerate(pairwise(ordered), 1) if right != left + 1]
        try:
            for first, end in pairwise([0, *ends, len(ordered)]):
                self._punch(
                    BACKING_HEADER_BYTES + ordered[first] * SEGMENT_BYTES,
                    (end - first) * SEGMENT_BYTES,
                )
        except OSError as error:
            if self._has_no_holes(error):
                return
            raise TierError(f"punching holes into {self.name} failed ({error.strerror}): check the file system") from error
        # the space that is free now makes a new reserve possible
        if self._reserve_used:
            self._keep_reserve()

    def close(self) -> None:
        """Truncate the file to its header and unlock it."""
        # the contents are worthless without the daemon, and the next start truncates the file too
        with suppress(OSError):
            self._forget()
        os.close(self._fd)

    def _claim(self, path: Path, is_new: bool) -> None:
        """Write our header over an older one, into a new file or into an empty device."""
        # an mmap is aligned as direct I/O needs it
        with mmap.mmap(-1, BLOCK_BYTES) as block:
            if not is_new:
                _refuse_foreign(path, self._fd)
            block[:] = MAGIC.ljust(BLOCK_BYTES, b"\0")
            try:
                os.pwrite(self._fd, block, 0)
                if not self.is_device:
                    os.ftruncate(self._fd, BLOCK_BYTES)
            except OSError as error:
                raise Refused(f"cannot write to {path} ({error.strerror}): free space there or give another --backing") from error
            self._try_holes()

    def _try_holes(self) -> None:
        """Find out whether space can be released, by discarding what an earlier daemon left, or by a hole in an empty file."""
        try:
            self._forget()
            if not self.is_device:
                self._punch(BLOCK_BYTES, BACKING_HEADER_BYTES - BLOCK_BYTES)
        except OSError as error:
            # what an earlier daemon left is harmless: it is never read, and written over
            if not self._has_no_holes(error):
                log.warning("%s: what was left there could not be discarded (%s)", self.name, error.strerror)

    def _has_no_holes(self, error: OSError) -> bool:
        """Whether `error` means that nothing can be discarded here, ever; remembers it, and logs it once."""
        if error.errno not in _NO_HOLES:
            return False
        if self.can_discard:
            self.can_discard = False
            log.info("%s cannot release space (%s): freed extents are only written again", self.name, error.strerror)
        return True

    def _forget(self) -> None:
        if not self.is_device:
            os.ftruncate(self._fd, BLOCK_BYTES)
        elif self.can_discard and (whole := (_device_bytes(self._fd) - BACKING_HEADER_BYTES) // SEGMENT_BYTES * SEGMENT_BYTES) > 0:
            self._punch(BACKING_HEADER_BYTES, whole)

    def _keep_reserve(self) -> None:
        """Allocate the space between header and extents, if the file system has it."""
        # the reserve is used by punching a hole, which gives its space to the next write
        if not self.can_discard:
            return
        # nobody else can take the space of a device
        if not self.is_device:
            try:
                with self._blocks.changed():
                    allocate(self._fd, BLOCK_BYTES, BACKING_HEADER_BYTES - BLOCK_BYTES)
            except OSError:
                return
        self._reserve_used = False

    def _use_reserve(self) -> bool:
        """Release the reserve for the next write; whether there was one."""
        if self._reserve_used or self.is_device:
            return False
        # before the hole: if that fails halfway, the reserve is no longer whole
        self._reserve_used = True
        with suppress(OSError):
            self._punch(BLOCK_BYTES, BACKING_HEADER_BYTES - BLOCK_BYTES)
        return True

    def _punch(self, offset: int, length: int) -> None:
        if self.is_device:
            fcntl.ioctl(self._fd, _BLKDISCARD, struct.pack("QQ", offset, length))
            return
        with self._blocks.changed():
            punch(self._fd, offset, length)


def _sector_bytes(fd: int) -> int:
    return min(direct_alignment(fd) or BLOCK_BYTES, BLOCK_BYTES)


def check_backing(path: Path) -> None:
    """Raise what FileTier would raise for `path`; creates and changes nothing."""
    path = backing_place(path)
    if not os.path.lexists(path):
        _check_new(path)
        return
    fd = _open(path, os.O_RDONLY)
    try:
        _lock(fd, path)
        _refuse_foreign(path, fd)
        _capacity(path, fd)
    finally:
        os.close(fd)


def _check_new(path: Path) -> None:
    """Raise Refused if no file can be created at `path` that may be a backing."""
    directory = path.parent
    if not os.access(directory, os.W_OK) or os.statvfs(directory).f_flag & os.ST_RDONLY:
        raise Refused(f"{directory} cannot be written to: give a --backing on a writable file system")
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        refuse_ram(path, fd, "--backing")
        if len(os.fsencode(path.name)) > os.fpathconf(fd, "PC_NAME_MAX"):
            raise Refused(f"the name of {path} is too long: give another --backing")
    finally:
        os.close(fd)
    space = os.statvfs(directory)
    if space.f_bavail * space.f_frsize < 2 * SEGMENT_BYTES:
        raise Refused(f"the file system of {directory} is full: free space there or give another --backing")


def _capacity(path: Path, fd: int) -> int:
    """Bytes of whole extents on a device, or free on the file system of a file. Raises Refused if there are none."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        capacity, instead = _device_bytes(fd) - BACKING_HEADER_BYTES, "give a larger device as --backing"
    else:
        space = os.fstatvfs(fd)
        capacity, instead = space.f_bavail * space.f_frsize, "free space there"
    whole = capacity // SEGMENT_BYTES * SEGMENT_BYTES
    if whole <= 0:
        raise Refused(f"{path} has space for {format_size(max(capacity, 0))}, not even one segment: {instead}")
    return whole


def _refuse_foreign(path: Path, fd: int) -> None:
    """Raise Refused unless the file or device has our header and nothing else, or the device has zeros at both ends."""
    # other formats have their headers there: at 1 KiB (ext4), 4 KiB (md), 64 KiB (btrfs) or in the last block (GPT, md)
    with mmap.mmap(-1, BACKING_HEADER_BYTES) as data:
        start = data[: os.preadv(fd, [data], 0)]
        is_ours = start.startswith(MAGIC) and not any(start[len(MAGIC) :])
        if not is_ours and stat.S_ISBLK(os.fstat(fd).st_mode) and not any(start):
            last = max(_device_bytes(fd) - BACKING_HEADER_BYTES, 0) // BLOCK_BYTES * BLOCK_BYTES
            is_ours = not any(data[: os.preadv(fd, [data], last)])
    if not is_ours:
        raise Refused(f"{path} was not made by tmemfs: give another --backing, or move it away yourself")


def _create(path: Path) -> int:
    """A descriptor of a new file for a backing. Raises Refused, and then leaves no file behind."""
    try:
        fd = create_backing(path, os.O_RDWR)
    except OSError as error:
        raise _cannot_open(path, error) from error
    try:
        refuse_ram(path, fd, "--backing")
        # not with open(2): a file system without direct I/O would create the file before it fails
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT | os.O_NOATIME)
    except (OSError, Refused) as error:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise (_cannot_open(path, error) if isinstance(error, OSError) else error) from error
    return fd


def _open(path: Path, mode: int) -> int:
    try:
        return open_backing(path, mode | os.O_DIRECT | os.O_NOATIME)
    except OSError as error:
        raise _cannot_open(path, error) from error


def _cannot_open(path: Path, error: OSError) -> Refused | Busy:
    if error.errno == errno.EBUSY:
        return Busy(f"{path} is in use (mounted or swap): give another --backing")
    if error.errno == errno.EINVAL:
        return Refused(f"the file system of {path} has no direct I/O: give a --backing on another one")
    return Refused(f"cannot open {path} ({error.strerror}): give another --backing")


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy(f"{path} is in use by another tmemfs daemon: give another --backing, or stop that one first") from None


def _device_bytes(fd: int) -> int:
    return int(struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0])
