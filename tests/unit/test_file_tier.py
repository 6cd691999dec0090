"""The file tier: nobody else's file is touched, one daemon at a time, and what is discarded is given back to the file system."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from tests.waiting import HANG_S, wait_until
from tmemfs.errors import BackingFull, Busy, Refused, TierError
from tmemfs.system.memory import punch
from tmemfs.system.ownership import EXT4
from tmemfs.tiers import file as file_module
from tmemfs.tiers.file import BACKING_HEADER_BYTES, MAGIC, FileTier, check_backing
from tmemfs.tiers.tier import Extent
from tmemfs.units import BLOCK_BYTES, SEGMENT_BYTES

HEADER = MAGIC.ljust(BLOCK_BYTES, b"\0")
#: The file of a daemon that was killed.
LEFT_BEHIND = HEADER.ljust(BACKING_HEADER_BYTES, b"\0") + b"pages that nobody wants" * 1000
#: What a file system may take for itself when it cuts an extent of its own in two.
METADATA_BYTES = 64 << 10
#: This tier only hands it on.
SEQUENCE = 1
#: What a file may hold that is not ours.
FOREIGN = {
    "empty": b"",
    "short": b"mine",
    "zeros": bytes(8192),
    "text": b"something else\n" * 1000,
    "nearly": MAGIC[:-2] + b"2\n" + bytes(BLOCK_BYTES),
    "about us": MAGIC + b"is what such a file begins with\n",
    "ours once": HEADER + b"something else",
}


@pytest.fixture(autouse=True)
def files_for_root_only() -> Iterator[None]:
    """What a test writes is as private as a backing has to be."""
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a backing may be, on a file system with direct I/O."""
    probe = tmp_path / "probe"
    try:
        os.close(os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"the file system of {tmp_path} has no direct I/O ({error.strerror}): give pytest another --basetemp")
    probe.unlink()
    return tmp_path / "backing"


@pytest.fixture
def tier(path: Path) -> Iterator[FileTier]:
    tier = FileTier(path)
    yield tier
    tier.close()


def buffer(size: int = SEGMENT_BYTES) -> memoryview:
    """Page-aligned memory."""
    return memoryview(mmap.mmap(-1, size))


def noise(seed: int, size: int = SEGMENT_BYTES) -> memoryview:
    view = buffer(size)
    view[:] = Random(seed).randbytes(size)
    return view


def read(tier: FileTier, extent: int, offset: int, size: int) -> bytes:
    into = buffer(size)
    tier.read(Extent(extent), offset, into, SEQUENCE)
    return bytes(into)


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_a_new_file_has_our_header_and_nothing_else(path: Path, tier: FileTier) -> None:
    assert path.read_bytes() == HEADER.ljust(BACKING_HEADER_BYTES, b"\0")
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tier.name, tier.is_device, tier.most_extents) == (str(path), False, None)


def test_the_header_is_the_documented_one() -> None:
    assert MAGIC == b"tmemfs backing, format 1\n"
    assert BACKING_HEADER_BYTES == 2 * SEGMENT_BYTES


def test_what_is_written_is_read_back(tier: FileTier) -> None:
    first, second = noise(1), noise(2, 3 * BLOCK_BYTES)
    tier.write(Extent(0), first, SEQUENCE)
    tier.write(Extent(5), second, SEQUENCE)
    assert read(tier, 0, 0, SEGMENT_BYTES) == first
    assert read(tier, 5, 0, 3 * BLOCK_BYTES) == second
    assert read(tier, 0, 7 * BLOCK_BYTES, 2 * BLOCK_BYTES) == first[7 * BLOCK_BYTES : 9 * BLOCK_BYTES]


def least_direct_read(path: Path) -> int:
    """The shortest read that the file system takes with O_DIRECT."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        for size in (512, 1024, 2048):
            with suppress(OSError):
                return os.preadv(fd, [buffer(size)], size)
        return BLOCK_BYTES
    finally:
        os.close(fd)


def test_a_sector_is_what_the_file_system_says_and_can_be_read(path: Path, tier: FileTier) -> None:
    tier.write(Extent(3), noise(5, 2 * BLOCK_BYTES), SEQUENCE)
    sector = tier.sector_bytes
    assert sector == least_direct_read(path), "what the file system takes, it was to say: Linux 6.1"
    assert sector in (512, 1024, 2048, 4096)
    assert read(tier, 3, BLOCK_BYTES - sector, 2 * sector) == noise(5, 2 * BLOCK_BYTES)[BLOCK_BYTES - sector :][: 2 * sector]


@pytest.mark.parametrize(("said", "sector"), [(None, BLOCK_BYTES), (512, 512), (65536, BLOCK_BYTES)])
def test_where_it_says_nothing_or_more_than_a_block_a_sector_is_a_block(
    path: Path, monkeypatch: pytest.MonkeyPatch, said: int | None, sector: int
) -> None:
    monkeypatch.setattr("tmemfs.tiers.file.direct_alignment", lambda fd: said)
    tier = FileTier(path)
    assert tier.sector_bytes == sector
    tier.close()


def test_an_extent_lies_behind_the_header_at_its_number(path: Path, tier: FileTier) -> None:
    tier.write(Extent(2), noise(3, BLOCK_BYTES), SEQUENCE)
    with path.open("rb") as file:
        file.seek(SEGMENT_BYTES * 4)
        assert file.read(BLOCK_BYTES) == noise(3, BLOCK_BYTES)
    assert path.read_bytes()[:BLOCK_BYTES] == HEADER


def test_an_extent_that_is_written_again_has_the_new_data(tier: FileTier) -> None:
    tier.write(Extent(0), noise(1), SEQUENCE)
    tier.write(Extent(0), noise(2, BLOCK_BYTES), SEQUENCE)
    assert read(tier, 0, 0, 2 * BLOCK_BYTES) == bytes(noise(2, BLOCK_BYTES)) + bytes(noise(1)[BLOCK_BYTES : 2 * BLOCK_BYTES])


def test_a_read_past_the_end_of_the_file_fails(tier: FileTier) -> None:
    tier.write(Extent(0), noise(1, BLOCK_BYTES), SEQUENCE)
    with pytest.raises(TierError, match="ends before extent 0: something else truncated it"):
        read(tier, 0, 0, 2 * BLOCK_BYTES)
    with pytest.raises(TierError, match="ends before extent 9"):
        read(tier, 9, 0, BLOCK_BYTES)


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EFBIG"])
def test_a_disk_without_space_is_full_not_broken(tier: FileTier, monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    fails(monkeypatch, "pwrite", number)
    with pytest.raises(BackingFull, match=r"is full: free space on its file system or lower backing\.max"):
        tier.write(Extent(0), noise(1, BLOCK_BYTES), SEQUENCE)


def test_a_disk_that_writes_nothing_is_full(tier: FileTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, position: 0)
    with pytest.raises(BackingFull, match="accepts no more data"):
        tier.write(Extent(0), noise(1, BLOCK_BYTES), SEQUENCE)


def test_a_disk_that_fails_is_said(tier: FileTier, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, "pwrite", "EIO")
    fails(monkeypatch, "preadv", "EIO")
    with pytest.raises(TierError, match=r"writing to .* failed \(.*\): check the disk") as caught:
        tier.write(Extent(0), noise(1, BLOCK_BYTES), SEQUENCE)
    assert not isinstance(caught.value, BackingFull)
    with pytest.raises(TierError, match=r"reading from .* failed \(.*\): check the disk"):
        read(tier, 0, 0, BLOCK_BYTES)


def fails(patch: pytest.MonkeyPatch, call: str, number: str) -> None:
    def failing(*_: object) -> int:
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    patch.setattr(os, call, failing)


def test_a_short_write_is_finished(tier: FileTier, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, data, position: real(fd, data[:BLOCK_BYTES], position))
        tier.write(Extent(1), noise(4, 4 * BLOCK_BYTES), SEQUENCE)
    assert read(tier, 1, 0, 4 * BLOCK_BYTES) == noise(4, 4 * BLOCK_BYTES)


def test_a_short_read_is_finished(tier: FileTier, monkeypatch: pytest.MonkeyPatch) -> None:
    tier.write(Extent(1), noise(4, 4 * BLOCK_BYTES), SEQUENCE)
    real = os.preadv
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda fd, into, position: real(fd, [into[0][:BLOCK_BYTES]], position))
        assert read(tier, 1, 0, 4 * BLOCK_BYTES) == noise(4, 4 * BLOCK_BYTES)


def test_a_discard_gives_the_disk_back_and_leaves_the_neighbours(path: Path, tier: FileTier) -> None:
    for number in range(5):
        tier.write(Extent(number), noise(number), SEQUENCE)
    before = allocated(path)
    tier.discard((Extent(3), Extent(1), Extent(2)))
    given_back = before - allocated(path)
    assert 3 * SEGMENT_BYTES - given_back <= METADATA_BYTES
    assert read(tier, 2, 0, BLOCK_BYTES) == bytes(BLOCK_BYTES)
    for number in (0, 4):
        assert read(tier, number, 0, SEGMENT_BYTES) == noise(number)


def test_neighbours_are_discarded_with_one_hole(tier: FileTier, monkeypatch: pytest.MonkeyPatch) -> None:
    holes: list[tuple[int, int]] = []
    monkeypatch.setattr("tmemfs.tiers.file.punch", lambda fd, offset, length: holes.append((offset, length)))
    tier.discard(tuple(map(Extent, (9, 0, 1, 4, 5, 6))))
    assert [(offset // SEGMENT_BYTES - 2, length // SEGMENT_BYTES) for offset, length in holes] == [(0, 2), (4, 3), (9, 1)]


def test_a_discard_of_what_was_never_written_is_nothing(path: Path, tier: FileTier) -> None:
    tier.discard((Extent(100),))
    assert path.stat().st_size == BACKING_HEADER_BYTES


def test_a_hole_that_cannot_be_punched_is_an_error_of_the_tier(tier: FileTier, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(fd: int, offset: int, length: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("tmemfs.tiers.file.punch", refuses)
    with pytest.raises(TierError, match=r"punching holes into .* \(Input/output error\): check the file system"):
        tier.discard((Extent(0),))


def test_nothing_is_left_at_the_end_but_the_header(path: Path) -> None:
    tier = FileTier(path)
    tier.write(Extent(3), noise(1), SEQUENCE)
    tier.close()
    assert path.read_bytes() == HEADER


def test_an_adopted_backing_keeps_what_is_in_it(path: Path, tier: FileTier) -> None:
    tier.write(Extent(3), noise(1), SEQUENCE)
    adopted = FileTier.adopt(path, os.dup(tier.fd), tier.capacity_bytes, False)
    found = memoryview(mmap.mmap(-1, len(noise(1))))
    adopted.read(Extent(3), 0, found, SEQUENCE)
    assert found == noise(1)
    same = ("name", "capacity_bytes", "most_extents", "sector_bytes", "is_device", "is_encrypted")
    assert [getattr(adopted, name) for name in same] == [getattr(tier, name) for name in same]
    assert not adopted.can_discard
    adopted.close()
    assert path.read_bytes() == HEADER


def test_what_an_earlier_daemon_left_is_cut_off(path: Path) -> None:
    path.write_bytes(LEFT_BEHIND)
    FileTier(path).close()
    assert path.read_bytes() == HEADER


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_is_not_ours_is_refused_and_untouched(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    before = path.stat()
    for use in (FileTier, check_backing):
        with pytest.raises(Refused, match=r"was not made by tmemfs: give another --backing, or move it away yourself"):
            use(path)
    assert path.read_bytes() == content
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_second_daemon_is_refused_by_name(path: Path, tier: FileTier) -> None:
    tier.write(Extent(0), noise(1), SEQUENCE)
    for use in (FileTier, check_backing):
        with pytest.raises(Busy, match=f"{path} is in use by another tmemfs daemon: give another --backing, or stop that one"):
            use(path)
    assert read(tier, 0, 0, SEGMENT_BYTES) == noise(1)


def test_the_lock_ends_with_the_tier(path: Path) -> None:
    FileTier(path).close()
    check_backing(path)
    FileTier(path).close()


def test_a_refused_file_is_not_kept_open(path: Path) -> None:
    path.write_bytes(b"mine")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(Refused):
            FileTier(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_capacity_is_what_is_free_in_whole_segments(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 5 * SEGMENT_BYTES + 4096)
    tier = FileTier(path)
    assert tier.capacity_bytes == 5 * SEGMENT_BYTES
    tier.close()


def free(patch: pytest.MonkeyPatch, size: int) -> None:
    """The file system has `size` bytes free."""

    class Space:
        f_bavail, f_frsize, f_flag = size // 4096, 4096, 0

    patch.setattr(os, "fstatvfs", lambda fd: Space)
    patch.setattr(os, "statvfs", lambda path: Space)


@pytest.mark.parametrize("exists", [False, True])
def test_a_file_system_without_room_for_a_segment_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    if exists:
        path.write_bytes(HEADER)
    free(monkeypatch, 512 << 10)
    with pytest.raises(Refused, match="has space for 512 KiB, not even one segment: free space there"):
        FileTier(path)
    assert not exists or path.read_bytes() == HEADER


def test_a_new_file_that_is_refused_is_not_left_behind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 0)
    with pytest.raises(Refused):
        FileTier(path)
    assert not path.exists()


def test_a_new_file_that_cannot_be_written_is_not_left_behind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, "pwrite", "ENOSPC")
    with pytest.raises(Refused, match=r"cannot write to .* \(No space left on device\): free space there"):
        FileTier(path)
    assert not path.exists()


def test_a_check_creates_nothing(path: Path) -> None:
    check_backing(path)
    assert not path.exists()


def test_a_check_changes_nothing(path: Path) -> None:
    path.write_bytes(LEFT_BEHIND)
    check_backing(path)
    assert path.read_bytes() == LEFT_BEHIND


@pytest.mark.parametrize("use", [FileTier, check_backing])
def test_a_directory_that_is_not_there_is_refused_with_what_to_do(path: Path, use: type) -> None:
    with pytest.raises(Refused, match=r"does not exist: create it"):
        use(path / "deeper" / "backing")


@pytest.mark.parametrize("use", [FileTier, check_backing])
def test_a_directory_is_no_backing(tmp_path: Path, use: type) -> None:
    with pytest.raises(Refused):
        use(tmp_path)


def test_a_check_finds_a_full_file_system(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, SEGMENT_BYTES)
    with pytest.raises(Refused, match="is full: free space there or give another --backing"):
        check_backing(path)


def test_a_reserve_is_allocated_behind_the_header(path: Path, tier: FileTier) -> None:
    assert allocated(path) >= BACKING_HEADER_BYTES
    assert path.stat().st_size == BACKING_HEADER_BYTES


def test_cleaning_gets_the_reserve_of_a_full_file_system_and_nothing_else_does(
    path: Path, tier: FileTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = os.pwrite

    def full(fd: int, data: memoryview, offset: int) -> int:
        if allocated(path) >= BACKING_HEADER_BYTES:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(BackingFull):
        tier.write(Extent(0), noise(1), SEQUENCE)
    tier.write(Extent(0), noise(1, BLOCK_BYTES), SEQUENCE, for_cleaning=True)
    assert read(tier, 0, 0, BLOCK_BYTES) == noise(1, BLOCK_BYTES)
    tier.discard((Extent(3),))
    assert allocated(path) >= BACKING_HEADER_BYTES
    with pytest.raises(BackingFull):
        tier.write(Extent(1), noise(1), SEQUENCE)


def refuses_holes(patch: pytest.MonkeyPatch, number: int) -> None:
    def refuses(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    patch.setattr("tmemfs.tiers.file.punch", refuses)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_holes_is_found_out_at_the_start(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    refuses_holes(monkeypatch, number)
    tier = FileTier(path)
    assert not tier.can_discard
    tier.write(Extent(0), noise(1), SEQUENCE)
    tier.discard((Extent(0),))
    tier.write(Extent(0), noise(2), SEQUENCE)
    assert read(tier, 0, 0, SEGMENT_BYTES) == noise(2)
    tier.close()
    assert path.read_bytes() == HEADER


def test_that_there_are_no_holes_is_remembered_after_the_first_that_is_refused(
    tier: FileTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tier.can_discard
    with monkeypatch.context() as patch:
        refuses_holes(patch, errno.EOPNOTSUPP)
        tier.discard((Extent(0),))
    assert not tier.can_discard
    refuses_holes(monkeypatch, errno.EIO)
    tier.discard((Extent(0),))


def test_a_start_where_holes_fail_this_time_goes_on_and_tries_them_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        refuses_holes(patch, errno.EIO)
        tier = FileTier(path)
    assert tier.can_discard
    tier.discard((Extent(0),))
    tier.close()


def on_ext4(patch: pytest.MonkeyPatch, path: Path) -> FileTier:
    """A tier that takes its file system for ext4."""
    patch.setattr("tmemfs.tiers.file.file_system", lambda fd: EXT4)
    return FileTier(path)


def test_blocks_are_allocated_before_they_are_written_and_no_more_of_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier, seen, pwrite = on_ext4(monkeypatch, path), list[int](), os.pwrite
    before = allocated(path)

    def noted(fd: int, data: memoryview, offset: int) -> int:
        seen.append(allocated(path) - before)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", noted)
    tier.write(Extent(3), noise(1, 5 * BLOCK_BYTES), SEQUENCE)
    assert 5 * BLOCK_BYTES <= seen[0] <= 5 * BLOCK_BYTES + METADATA_BYTES
    assert read(tier, 3, 0, 5 * BLOCK_BYTES) == noise(1, 5 * BLOCK_BYTES)
    tier.close()


def test_other_file_systems_are_left_to_allocate_as_they_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmemfs.tiers.file.file_system", lambda fd: 0)
    tier, allocate = FileTier(path), list[int]()
    monkeypatch.setattr("tmemfs.tiers.file.allocate", lambda fd, offset, length: allocate.append(length))
    tier.write(Extent(0), noise(1), SEQUENCE)
    assert not allocate and read(tier, 0, 0, SEGMENT_BYTES) == noise(1)
    tier.close()


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_allocates_nothing_ahead_is_asked_once(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    tier, asked = on_ext4(monkeypatch, path), list[int]()

    def refuse(fd: int, offset: int, length: int) -> None:
        asked.append(offset)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tmemfs.tiers.file.allocate", refuse)
    for extent in range(3):
        tier.write(Extent(extent), noise(extent), SEQUENCE)
        assert read(tier, extent, 0, SEGMENT_BYTES) == noise(extent)
    assert len(asked) == 1
    tier.close()


def test_a_disk_without_space_to_allocate_is_full(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = on_ext4(monkeypatch, path)

    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "injected")

    monkeypatch.setattr("tmemfs.tiers.file.allocate", refuse)
    with pytest.raises(BackingFull):
        tier.write(Extent(0), noise(0), SEQUENCE)
    tier.close()


def test_a_hole_waits_for_the_write_and_a_read_for_neither(tier: FileTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would keep the file from the reads while the hole waits, so the hole is not begun."""
    tier.write(Extent(0), noise(0), SEQUENCE)
    tier.write(Extent(1), noise(1), SEQUENCE)
    writes, goes_on, punched, pwrite = threading.Event(), threading.Event(), threading.Event(), os.pwrite

    def slow(fd: int, data: memoryview, offset: int) -> int:
        writes.set()
        assert goes_on.wait(HANG_S)
        return pwrite(fd, data, offset)

    def noted(fd: int, offset: int, length: int) -> None:
        punched.set()
        punch(fd, offset, length)

    monkeypatch.setattr(os, "pwrite", slow)
    monkeypatch.setattr(file_module, "punch", noted)
    threads = [
        threading.Thread(target=tier.write, args=(Extent(2), noise(2), SEQUENCE)),
        threading.Thread(target=tier.discard, args=((Extent(1),),)),
    ]
    threads[0].start()
    assert writes.wait(HANG_S)
    threads[1].start()
    wait_until(lambda: tier._blocks._changes)
    assert read(tier, 0, 0, SEGMENT_BYTES) == noise(0) and not punched.is_set()
    goes_on.set()
    for thread in threads:
        thread.join(HANG_S)
    assert punched.is_set() and read(tier, 2, 0, SEGMENT_BYTES) == noise(2)


def test_a_read_does_not_change_the_time_of_the_last_access(path: Path, tier: FileTier) -> None:
    tier.write(Extent(0), noise(0), SEQUENCE)
    os.utime(path, ns=(0, path.stat().st_mtime_ns))
    read(tier, 0, 0, BLOCK_BYTES)
    assert path.stat().st_atime_ns == 0
