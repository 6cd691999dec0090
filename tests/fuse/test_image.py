"""The swap image through a real mount: any offset and length, discards, limits, and what a damaged backing does to it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounted import Place, mounted, tmemfs
from tests.parts import page_of
from tests.waiting import wait_until
from tmemfs.cli.real_pages import RealPages
from tmemfs.tiers.file import BACKING_HEADER_BYTES
from tmemfs.units import MIB, PAGE_BYTES, SECTOR_BYTES

pytestmark = pytest.mark.fuse

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
PUNCH = 3


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """0, or the errno."""
    return ctypes.get_errno() if _libc.fallocate(fd, mode, offset, length) else 0


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with mounted(tmp_path) as place:
        yield place


@pytest.fixture
def image(place: Place) -> Iterator[int]:
    fd = os.open(place.image, os.O_RDWR)
    yield fd
    os.close(fd)


def test_requests_are_read_and_not_spliced(place: Place) -> None:
    for _ in range(3):
        place.read("stat")
    opened = [os.readlink(file) for file in Path(f"/proc/{place.number('worker_pid')}/fd").iterdir()]
    assert "/dev/fuse" in opened
    pipes = [name for name in opened if name.startswith("pipe:")]
    assert len(set(pipes)) == len(pipes)  # libfuse makes one the first time it splices, and has both of its ends


def test_a_mount_without_swap_changes_no_setting_of_the_kernel(place: Place) -> None:
    assert place.read("kernel.tuning") == "[auto] off"
    assert place.number("kernel_tuning_in_use") == place.number("watermark_boost_off") == 0
    place.write("kernel.tuning", "off")
    assert place.read("kernel.tuning") == "auto [off]"
    with pytest.raises(OSError, match="Invalid argument"):
        place.write("kernel.tuning", "on")
    place.write("kernel.tuning", "auto")
    assert place.number("kernel_tuning_in_use") == 0


def test_any_offset_and_length_reads_what_was_written(place: Place, image: int) -> None:
    rng = random.Random(7)
    model = bytearray(4 * MIB)
    pages = RealPages(1)
    for step in range(1200):
        length = rng.choice([1, 512, 4096, 5000, 65536, 300_000])
        offset = rng.randrange(len(model) - length)
        offset -= offset % rng.choice([1, 512, 4096])
        if rng.random() < 0.5:
            data = b"".join(pages.page(rng.randrange(9999)) for _ in range(length // PAGE_BYTES + 1))[:length]
            assert os.pwrite(image, data, offset) == length
            model[offset : offset + length] = data
        else:
            assert os.pread(image, length, offset) == model[offset : offset + length], (step, offset, length)
        if step % 100 == 99:
            place.write("shrink", "all")
    assert place.number("loads_disk") > 100


def test_direct_io_of_whole_pages(place: Place) -> None:
    fd = os.open(place.image, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 64 * PAGE_BYTES) as written, mmap.mmap(-1, 64 * PAGE_BYTES) as found:
            written[:] = b"".join(page_of("half", number) for number in range(64))
            assert os.pwrite(fd, written, MIB) == len(written)
            assert os.preadv(fd, [found], MIB) == len(found)
            assert found[:] == written[:]
    finally:
        os.close(fd)


def test_several_programs_read_and_write_at_once(place: Place) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        fd = os.open(place.image, os.O_RDWR)
        rng = random.Random(number)
        held = {slot: b"" for slot in range(number, 4096, 4)}
        try:
            for step in range(600):
                slot = rng.choice(list(held))
                if rng.random() < 0.5:
                    held[slot] = page_of("half", step * 4 + number)
                    os.pwrite(fd, held[slot], slot * PAGE_BYTES)
                elif os.pread(fd, PAGE_BYTES, slot * PAGE_BYTES) != (held[slot] or bytes(PAGE_BYTES)):
                    wrong.append(slot)
        finally:
            os.close(fd)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        place.write("shrink", "all")
        for thread in threads:
            thread.join(0.05)
    assert not wrong


def test_reads_end_at_the_end_of_the_image(place: Place, image: int) -> None:
    size = os.fstat(image).st_size
    assert size == 256 * MIB
    assert os.pread(image, 3 * PAGE_BYTES, size - PAGE_BYTES) == bytes(PAGE_BYTES)
    assert os.pread(image, PAGE_BYTES, size) == b""


def test_writes_past_the_end_are_refused(place: Place, image: int) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        os.pwrite(image, b"x" * PAGE_BYTES, 256 * MIB)
    assert caught.value.errno == errno.ENOSPC
    assert place.number("pages_stored") == 0


def test_the_image_keeps_its_size(place: Place, image: int) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        os.ftruncate(image, MIB)
    assert os.fstat(image).st_size == 256 * MIB


def test_statfs_tells_size_and_free_space(place: Place, image: int) -> None:
    before = os.statvfs(place.mountpoint)
    os.pwrite(image, b"".join(page_of("half", number) for number in range(100)), 0)
    after = os.statvfs(place.mountpoint)
    assert (before.f_bsize, before.f_blocks * before.f_frsize) == (PAGE_BYTES, 256 * MIB)
    assert before.f_bfree - after.f_bfree == 100


def test_discards_of_any_place_and_size_read_as_zeros(place: Place) -> None:
    fd = os.open(place.image, os.O_RDWR)
    model = bytearray(b"".join(page_of("half", number) for number in range(1024)))
    discards = ((PAGE_BYTES, PAGE_BYTES), (100, 50), (100, 5000), (4000, 9000), (512, 3 * MIB), (0, 4 * MIB))
    try:
        for on_disk in (False, True):
            for offset, length in discards:
                os.pwrite(fd, model, 0)
                if on_disk:
                    place.write("shrink", "all")
                assert fallocate(fd, PUNCH, offset, length) == 0
                expected = model[:offset] + bytes(length) + model[offset + length :]
                assert os.pread(fd, len(model), 0) == expected, (on_disk, offset, length)
    finally:
        os.close(fd)


def test_discarding_everything_gives_ram_and_disk_back(place: Place) -> None:
    fd = os.open(place.image, os.O_RDWR)
    try:
        for first in range(0, 4096, 64):
            os.pwrite(fd, b"".join(page_of("raw", number) for number in range(first, first + 64)), first * PAGE_BYTES)
        place.write("shrink", "8M")
        assert place.backing.stat().st_blocks * 512 >= 8 * MIB
        assert fallocate(fd, PUNCH, 0, 256 * MIB) == 0
        place.write("pool.high", "max")  # the hole is punched in the background; anything that takes a turn will do
        stat = place.flat()
        assert (stat["pages_stored"], stat["compressed_bytes"]) == ("0", "0")
        assert int(stat["pool_used"]) <= 2 * MIB
    finally:
        os.close(fd)
    settles(place)


def settles(place: Place) -> None:
    """Everything that was given up is back at the system: at most reserve, buffers and the open segments are left."""
    wait_until(lambda: place.number("pool_resident") <= 8 * MIB)
    wait_until(lambda: place.backing.stat().st_blocks * 512 <= BACKING_HEADER_BYTES + MIB)


def test_other_kinds_of_fallocate_are_not_supported(place: Place) -> None:
    fd = os.open(place.image, os.O_RDWR)
    try:
        assert fallocate(fd, 0, 0, PAGE_BYTES) == errno.EOPNOTSUPP
    finally:
        os.close(fd)


def test_without_a_backing_a_full_pool_refuses_stores_and_keeps_the_rest(tmp_path: Path) -> None:
    with mounted(tmp_path, "--backing", "none", pool_max="10M") as place:
        fd = os.open(place.image, os.O_RDWR)
        try:
            stored = 0
            with pytest.raises(OSError, match="No space left"):
                for stored in range(4096):
                    os.pwrite(fd, page_of("raw", stored), stored * PAGE_BYTES)
            assert stored > 1000
            assert place.state.startswith("degraded: the backing is full")
            for slot in range(stored):
                assert os.pread(fd, PAGE_BYTES, slot * PAGE_BYTES) == page_of("raw", slot)
            assert int(place.flat("events")["stores_refused"]) >= 1
            assert fallocate(fd, PUNCH, 0, 2 * MIB) == 0
            os.pwrite(fd, page_of("raw", 9), 0)
            assert os.pread(fd, PAGE_BYTES, 0) == page_of("raw", 9)
        finally:
            os.close(fd)


def test_a_damaged_extent_fails_its_loads_and_nothing_else(place: Place, image: int) -> None:
    for first in range(0, 1024, 64):
        os.pwrite(image, b"".join(page_of("raw", number) for number in range(first, first + 64)), first * PAGE_BYTES)
    place.write("shrink", "all")
    with open(place.backing, "r+b") as backing:
        backing.seek(BACKING_HEADER_BYTES + 7 * PAGE_BYTES + 1000)
        backing.write(b"damage")
    failed = []
    for slot in range(1024):
        try:
            assert os.pread(image, PAGE_BYTES, slot * PAGE_BYTES) == page_of("raw", slot)
        except OSError as error:
            assert error.errno == errno.EIO
            failed.append(slot)
    assert len(failed) == 1
    assert place.state.startswith("degraded: loads found 1 damaged records")
    assert place.flat("events")["corrupt_records"] == "1"
    os.pwrite(image, page_of("raw", 5), failed[0] * PAGE_BYTES)
    assert os.pread(image, PAGE_BYTES, failed[0] * PAGE_BYTES) == page_of("raw", 5)


def test_a_read_ends_in_front_of_a_damaged_page_until_it_is_written(place: Place, image: int) -> None:
    pages = [page_of("raw", number) for number in range(256)]
    os.pwrite(image, b"".join(pages), 0)
    place.write("shrink", "all")
    with open(place.backing, "r+b") as backing:
        backing.seek(BACKING_HEADER_BYTES + 100 * PAGE_BYTES)
        backing.write(b"damage")
    [bad] = [slot for slot in range(256) if not _is_readable(image, slot)]
    first, end = bad - 5, bad + 11
    assert os.pread(image, 16 * PAGE_BYTES, first * PAGE_BYTES) == b"".join(pages[first:bad])
    assert os.pread(image, 16 * PAGE_BYTES, first * PAGE_BYTES + 100) == b"".join(pages[first:bad])[100:]
    with pytest.raises(OSError, match="Input/output error"):
        os.pread(image, 16 * PAGE_BYTES, bad * PAGE_BYTES)
    with pytest.raises(OSError, match="Input/output error"):  # never short: see pager.py
        os.pread(image, PAGE_BYTES, bad * PAGE_BYTES - 512)
    assert os.pread(image, 10 * PAGE_BYTES, (bad + 1) * PAGE_BYTES) == b"".join(pages[bad + 1 : end])
    with pytest.raises(OSError, match="Input/output error"):
        os.pwrite(image, b"part", bad * PAGE_BYTES)
    assert not _is_readable(image, bad)
    os.pwrite(image, pages[0], bad * PAGE_BYTES)
    assert os.pread(image, 16 * PAGE_BYTES, first * PAGE_BYTES) == b"".join([*pages[first:bad], pages[0], *pages[bad + 1 : end]])
    assert place.flat("events")["corrupt_records"] == "1"  # however often it was met


def _is_readable(image: int, slot: int) -> bool:
    try:
        return len(os.pread(image, PAGE_BYTES, slot * PAGE_BYTES)) == PAGE_BYTES
    except OSError:
        return False


def test_damage_is_reported_until_it_is_acknowledged(place: Place, image: int) -> None:
    os.pwrite(image, b"".join(page_of("raw", number) for number in range(64)), 0)
    place.write("shrink", "all")
    with open(place.backing, "r+b") as backing:
        backing.seek(BACKING_HEADER_BYTES + 9 * PAGE_BYTES)
        backing.write(b"damage")
    bad = [slot for slot in range(64) if not _is_readable(image, slot)]
    assert len(bad) == 1
    assert place.state == "degraded: loads found 1 damaged records: check the backing device"
    assert f"'tmemfs doctor --acknowledge {place.mountpoint}'" in tmemfs("doctor", check=False).stdout
    with pytest.raises(OSError, match="Invalid argument"):
        place.write("damage", "0")
    said = tmemfs("doctor", "--acknowledge", place.mountpoint).stdout
    assert said == f"{place.mountpoint}: acknowledged\ndamaged_in_ram 0\ndamaged_on_disk 1\nfailed_reads 0\n"
    assert place.state == "running"
    assert place.read("damage") == "damaged_in_ram 0\ndamaged_on_disk 0\nfailed_reads 0"
    assert place.flat("events")["corrupt_records"] == "1"
    assert not _is_readable(image, bad[0]) and place.state == "running"
    assert f"damage{'':17}ok" in tmemfs("doctor", check=False).stdout


def test_a_single_page_load_reads_two_blocks_at_most(place: Place) -> None:
    pages = RealPages(3)
    fd = os.open(place.image, os.O_RDWR)
    try:
        for first in range(0, 8192, 64):
            os.pwrite(fd, b"".join(pages.page(number) for number in range(first, first + 64)), first * PAGE_BYTES)
        place.write("shrink", "all")
        for slot in random.Random(1).sample(range(8192), 200):
            before = place.number("disk_read_bytes")
            assert os.pread(fd, PAGE_BYTES, slot * PAGE_BYTES) == pages.page(slot)
            read = place.number("disk_read_bytes") - before
            assert 0 < read <= 2 * PAGE_BYTES and not read % SECTOR_BYTES
        for slot in range(8192):  # enough for the mean to be that of all
            assert os.pread(fd, PAGE_BYTES, slot * PAGE_BYTES) == pages.page(slot)
        assert place.number("disk_read_bytes") / place.number("disk_reads") < 1.5 * PAGE_BYTES
    finally:
        os.close(fd)
