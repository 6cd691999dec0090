"""The control directory of a real mount: every file of the table, what it takes, what it refuses, and that it does it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.exposition import families
from tests.mounted import Place, mounted, tmemfs
from tests.parts import page_of
from tests.waiting import wait_until
from tmemfs.cli.real_pages import RealPages
from tmemfs.control_files import FILES
from tmemfs.observe.registry import units
from tmemfs.system.memory import punch
from tmemfs.units import MIB, PAGE_BYTES

pytestmark = pytest.mark.fuse

READ_ONLY = [file.name for file in FILES if not file.is_writable]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with mounted(tmp_path_factory.mktemp("control")) as place:
        yield place


def fill(place: Place, count: int, kind: str = "raw") -> None:
    fd = os.open(place.image, os.O_RDWR)
    try:
        for number in range(0, count, 64):
            data = b"".join(page_of("raw" if kind == "raw" else "half", number + at) for at in range(64))
            os.pwrite(fd, data, number * PAGE_BYTES)
    finally:
        os.close(fd)


def errno_of_write(place: Place, name: str, value: str) -> int:
    with pytest.raises(OSError) as caught:
        place.write(name, value)
    return caught.value.errno or 0


def test_the_directory_is_the_table(place: Place) -> None:
    assert sorted(os.listdir(place.mountpoint)) == ["control", "swap"]
    assert sorted(os.listdir(place.mountpoint / "control")) == sorted(file.name for file in FILES)
    for file in FILES:
        mode = (place.mountpoint / "control" / file.name).stat().st_mode
        assert stat.S_IMODE(mode) == file.mode


@pytest.mark.parametrize("name", [file.name for file in FILES])
def test_every_file_reads_as_lines(place: Place, name: str) -> None:
    fill(place, 64)
    text = (place.mountpoint / "control" / name).read_text()
    assert text.endswith("\n") and text.strip()


@pytest.mark.parametrize("name", READ_ONLY)
def test_read_only_files_refuse_to_open_for_writing(place: Place, name: str) -> None:
    with pytest.raises(OSError, match="Permission denied"):
        os.open(place.mountpoint / "control" / name, os.O_WRONLY)
    done = tmemfs("set", f"{name}=1", "--mountpoint", place.mountpoint, check=False)
    assert done.returncode == 2 and f"{name} cannot be written" in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "number"),
    [
        ("pool.max", "nonsense", errno.EINVAL),
        ("pool.max", " ", errno.EINVAL),
        ("pool.max", "1K", errno.ERANGE),
        ("pool.max", "10000G", errno.ERANGE),
        ("pool.max", "-5M", errno.EINVAL),
        ("pool.high", "1T", errno.ERANGE),
        ("pool.high", "0", errno.ERANGE),
        ("pool.low", "63M", errno.ERANGE),
        ("pool.low", "x", errno.EINVAL),
        ("backing.max", "lots", errno.EINVAL),
        ("codec", "lzma", errno.EINVAL),
        ("codec", "zstd:99", errno.EINVAL),
        ("codec", "zstd:x", errno.EINVAL),
        ("codec", "lz4:3", errno.EINVAL),
        ("shrink", "nonsense", errno.EINVAL),
        ("shrink", "0", errno.EINVAL),
        ("shrink", "1M deadline=soon", errno.EINVAL),
        ("shrink", "1M now=1", errno.EINVAL),
    ],
)
def test_a_bad_value_is_refused_and_changes_nothing(place: Place, name: str, value: str, number: int) -> None:
    before = {file.name: place.read(file.name) for file in FILES[:9]}
    assert errno_of_write(place, name, value) == number
    done = tmemfs("set", f"{name}={value}", "--mountpoint", place.mountpoint, check=False)
    assert done.returncode == 2 and ":" in done.stderr
    assert {file.name: place.read(file.name) for file in FILES[:9]} == before


def test_a_value_longer_than_a_page_is_refused(place: Place) -> None:
    assert errno_of_write(place, "shrink", "1" * 5000) == errno.EINVAL


def test_limits_take_effect_at_once(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        fill(place, 8192)
        place.write("pool.max", "16M\n")
        assert place.read("pool.max") == str(16 * MIB)
        assert place.number("pool_resident") <= 16 * MIB
        assert (place.read("pool.high"), place.read("pool.low")) == (str(int(14.4 * MIB)), str(int(12.8 * MIB)))
        place.write("pool.high", "12M")
        place.write("pool.low", "10M")
        fill(place, 8192)
        assert place.number("pool_resident") <= 16 * MIB
        place.write("pool.max", "50%")
        assert int(place.read("pool.max")) > 16 * MIB
        assert (place.read("pool.high"), place.read("pool.low")) == (str(12 * MIB), str(10 * MIB))


def test_the_background_shrinks_from_high_to_low(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        place.write("pool.high", "32M")
        place.write("pool.low", "24M")
        fill(place, 9000)
        wait_until(lambda: place.number("pool_resident") <= 32 * MIB)
        assert place.number("pages_on_disk") > 0


def test_a_shrink_returns_when_memory_is_back(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        fill(place, 8192)
        wait_until(lambda: place.number("pool_current") - place.number("pool_used") >= 6 * MIB)  # the reserve is full
        shmem = place.number("resident_shmem")
        place.write("shrink", "16M deadline=100s")
        answer = place.flat("shrink")
        assert (answer["requested"], answer["freed"], answer["reason"]) == (str(16 * MIB), str(16 * MIB), "-")
        assert shmem - place.number("resident_shmem") >= 15 * MIB
        assert float(answer["seconds"]) > 0 and int(answer["written"]) > 0
        place.write("shrink", "all")
        assert place.number("pages_in_ram") == 0


def test_a_shrink_that_falls_short_says_how_far_it_came(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        fill(place, 2048)
        assert errno_of_write(place, "shrink", "60M") == errno.EAGAIN
        answer = place.flat("shrink")
        assert answer["reason"] == "the pool holds no more pages" and int(answer["freed"]) > 0
        done = tmemfs("shrink", "60M", "--mountpoint", place.mountpoint, check=False)
        assert done.returncode == 1 and done.stderr.startswith("tmemfs: shrink") and "reason" in done.stdout


def test_a_full_backing_is_said_and_ends(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        place.write("backing.max", "4M")
        fill(place, 8192)
        assert errno_of_write(place, "shrink", "all") == errno.EAGAIN
        assert place.state.startswith("degraded: the backing is full")
        assert "the backing is full" in place.flat("shrink")["reason"]
        assert int(place.read("backing.current")) <= 4 * MIB
        place.write("backing.max", "max")
        place.write("shrink", "all")
        assert place.state == "running"


def test_the_codec_is_shown_in_brackets_and_old_pages_stay_readable(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        fd = os.open(place.image, os.O_RDWR)
        try:
            for number, codec in enumerate(["lz4", "zstd:3", "none", "zstd"]):
                place.write("codec", codec)
                os.pwrite(fd, page_of("text", number), number * PAGE_BYTES)
            assert place.read("codec") == "lz4 [zstd:1] none"
            for number in range(4):
                assert os.pread(fd, PAGE_BYTES, number * PAGE_BYTES) == page_of("text", number)
        finally:
            os.close(fd)


def test_zram_tools_can_read_the_statistics(place: Place) -> None:
    fill(place, 64)
    assert [len(place.read(name).split()) for name in ("mm_stat", "io_stat", "bd_stat")] == [9, 4, 3]
    original, compressed, used = map(int, place.read("mm_stat").split()[:3])
    assert original >= 64 * PAGE_BYTES and 0 < compressed <= used


def test_metrics_are_prometheus_text(place: Place) -> None:
    found = families(place.read("metrics") + "\n")
    assert all(float(value) >= 0 for _, value in found.values())
    assert found["tmemfs_stores_total"][0] == "counter" and found["tmemfs_healthy"][1] == "1"
    assert found.keys() >= {"tmemfs_requests_total", "tmemfs_stores_refused_total", "tmemfs_memory_locked"}


def test_segments_are_listed_oldest_first(place: Place) -> None:
    fill(place, 1024)
    rows = [line.split() for line in place.read("segments").splitlines()]
    assert rows and all(len(row) == 7 for row in rows)
    sequences = [int(row[3]) for row in rows]
    assert sequences == sorted(sequences)


def test_stat_has_the_outcome_of_every_protection(place: Place) -> None:
    values = place.flat()
    protections = ("memory_locked", "io_flusher", "oom_score_adj_set", "realtime", "core_dumps_off", "gc_frozen", "heap_kept")
    assert {values[key] for key in protections} <= {"0", "1"}
    assert values["gc_frozen"] == "1" and values["heap_kept"] == "1"


def test_every_key_of_stat_is_there_and_applies_but_kernel_settings_and_limits(place: Place) -> None:
    values = place.flat()
    assert values.keys() == units().keys()
    assert {key for key, value in values.items() if value == "-"} == {
        "min_free_kbytes", "min_free_kbytes_administrators", "watermark_boost_factor", "watermark_boost_factor_administrators",
    }  # fmt: skip


def test_the_command_shows_what_the_files_say(place: Place) -> None:
    fill(place, 64)
    assert tmemfs("get", "pool.max", "--mountpoint", place.mountpoint).stdout == f"{64 * MIB}\n"
    assert "pool:" in tmemfs("stat", place.mountpoint).stdout
    assert '"pool_max": 67108864' in tmemfs("stat", "--json", place.mountpoint).stdout
    assert "pool_max 67108864\n" in tmemfs("stat", "--raw", place.mountpoint).stdout
    row = tmemfs("stat", "--bytes", "--noheadings", "--output", "pool_max,codec", place.mountpoint).stdout.split()
    assert row == ["67108864", "lz4"]
    assert tmemfs("stat", "--output", "nothing", place.mountpoint, check=False).returncode == 2


def test_statistics_of_the_image_follow_what_is_stored(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        fd = os.open(place.image, os.O_RDWR)
        try:
            for number, kind in enumerate(("zero", "fill", "raw", "text", "half")):
                os.pwrite(fd, page_of(kind, 9), number * PAGE_BYTES)  # type: ignore[arg-type]
        finally:
            os.close(fd)
        found = place.flat()
        assert [found[key] for key in ("pages_stored", "zero_pages", "same_filled_pages", "incompressible_pages")] == list("5121")


def test_compact_squeezes_out_what_died_and_answers(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        place.write("clean.daily", "0")  # only on request
        fill(place, 4096)
        place.write("shrink", "all")
        fd = os.open(place.image, os.O_RDWR)
        try:
            for slot in range(0, 4096, 2):
                punch(fd, slot * PAGE_BYTES, PAGE_BYTES)
            disk = place.number("backing_current")
            done = tmemfs("compact", "1.10", "--mountpoint", place.mountpoint)
            answer = place.flat("compact")
            assert done.stdout == place.read("compact") + "\n" and answer["reason"] == "-"
            assert float(answer["before"]) > 1.9 and float(answer["after"]) <= 1.10
            assert place.number("backing_current") < disk * 0.6
            assert place.number("cleaned_segments") == int(answer["segments"]) > 0
            for slot in range(1, 4096, 2):
                assert os.pread(fd, PAGE_BYTES, slot * PAGE_BYTES) == page_of("raw", slot)
        finally:
            os.close(fd)
        assert errno_of_write(place, "compact", "1.0001") == errno.EAGAIN
        assert place.flat("compact")["reason"] == "nothing more can be gained"


def test_recompress_makes_idle_pages_smaller_and_says_so(tmp_path: Path) -> None:
    pages = RealPages(2)
    with mounted(tmp_path) as place:
        assert place.read("recompress") == "[off] zstd"
        fd = os.open(place.image, os.O_RDWR)
        try:
            for slot in range(8192):
                os.pwrite(fd, pages.page(slot), slot * PAGE_BYTES)
            before = place.number("compressed_bytes")
            place.write("recompress", "zstd:1")
            assert place.read("recompress") == "off [zstd:1]"
            wait_until(lambda: place.number("zstd_dict_pages") > 6000)
            stat = place.flat()
            assert int(stat["compressed_bytes"]) < 0.85 * before and stat["dictionaries"] == "1"
            assert int(stat["recompressed_records"]) >= int(stat["zstd_dict_pages"])
            assert before - int(stat["compressed_bytes"]) > 0.9 * int(stat["recompressed_saved_bytes"]) > 0
            place.write("recompress", "off")
            place.write("shrink", "all")
            for slot in range(8192):
                assert os.pread(fd, PAGE_BYTES, slot * PAGE_BYTES) == pages.page(slot)
        finally:
            os.close(fd)


@pytest.mark.parametrize(("name", "value", "number"), [
    ("compact", "1", errno.EINVAL), ("compact", "dense", errno.EINVAL), ("clean.rate", "fast", errno.EINVAL),
    ("recompress", "on", errno.EINVAL), ("recompress", "zstd:20", errno.EINVAL), ("clean.rate", "0", errno.ERANGE),
    ("clean.daily", "-1", errno.EINVAL),
])  # fmt: skip
def test_what_cannot_be_done_in_the_background_is_refused(place: Place, name: str, value: str, number: int) -> None:
    before = place.read(name)
    assert errno_of_write(place, name, value) == number
    assert place.read(name) == before


def test_the_budget_of_cleaning_is_set_and_shown(place: Place) -> None:
    place.write("clean.rate", "16M")
    place.write("clean.daily", "2G")
    assert (place.read("clean.rate"), place.read("clean.daily")) == (str(16 * MIB), str(2 << 30))
    assert place.flat()["cleaner_budget_left"] == str(2 << 30)
    place.write("clean.daily", "max")
    assert (place.read("clean.daily"), place.flat()["cleaner_budget_left"]) == ("max", "max")
