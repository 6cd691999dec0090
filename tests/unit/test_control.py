"""The control directory's table: documented as it is, an errno for every error, nothing changed by what is refused."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Final

import pytest

from tests.parts import FaultyTier, Regions, new_limits, new_pressure, page_of
from tmemfs.control import Attribute, ControlDirectory
from tmemfs.control_files import FILES, ControlFile
from tmemfs.engine import Engine
from tmemfs.errors import BadValue, OutOfRange, TmemfsError
from tmemfs.fuse.errnos import errno_of
from tmemfs.jobs.limits import SMALLEST_POOL_BYTES, parse_pool_max
from tmemfs.jobs.supervision import Jobs
from tmemfs.observe.metric import Output
from tmemfs.observe.registry import shown_in
from tmemfs.services import Services
from tmemfs.store.codec import encode, parse_codec
from tmemfs.units import MIB

LIMIT: Final = 12 * MIB
RAM: Final = 64 * MIB


@pytest.fixture
def services() -> Iterator[Services]:
    regions = Regions.new(slots=1024, frames=16, extents=16)
    engine = Engine.over(partial(regions.start, limit=LIMIT // MIB, slots=1024), FaultyTier(), parse_codec("lz4"))
    yield Services(engine, new_limits(engine, RAM, 16 * MIB), new_pressure(engine), Jobs())
    regions.close()


@pytest.fixture
def files(services: Services) -> dict[str, Attribute]:
    return {attribute.name: attribute for attribute in ControlDirectory(services).attributes}


def read(files: dict[str, Attribute], name: str) -> str:
    return files[name].read()


async def write(files: dict[str, Attribute], name: str, value: str) -> None:
    found = files[name].write
    assert found is not None
    await found(value)


def values(files: dict[str, Attribute]) -> dict[str, str]:
    """What every file says that is not of this very moment."""
    return {name: read(files, name) for name in files if name not in ("stat", "metrics")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_says_what_it_is(file: ControlFile) -> None:
    assert file.help.endswith(".") and len(file.help) > 10
    assert file.unit
    assert re.fullmatch(r"[a-z_]+(\.[a-z]+)?", file.name)


def test_names_are_unique() -> None:
    names = [file.name for file in FILES]
    assert len(set(names)) == len(names)


def test_the_mode_is_what_can_be_done(files: dict[str, Attribute]) -> None:
    ways = [(False, False), (True, False), (False, True), (True, True)]
    assert [ControlFile("a", "-", "A file.", *way).mode for way in ways] == [0o444, 0o644, 0o400, 0o600]
    assert {name for name, attribute in files.items() if attribute.write} == {file.name for file in FILES if file.is_writable}
    assert {file.name for file in FILES if file.mode == 0o644} == {
        "pool.max", "pool.high", "pool.low", "backing.max", "shrink", "compact", "clean.rate", "clean.daily", "recompress",
        "writeahead", "writeahead.rest", "pressure.mode", "pressure.reserve", "pressure.growth",
        "codec", "kernel.tuning", "latency", "watchdog", "damage",
    }  # fmt: skip


def test_the_files_that_are_documents_are_those_with_more_than_one_line(files: dict[str, Attribute], services: Services) -> None:
    services.engine.tmem.store(0, [encode(page_of("raw", number), parse_codec("lz4")) for number in range(300)])
    texts = {name: read(files, name) for name in files if name != "state"}  # whose first line is the value
    assert {name for name, text in texts.items() if text.count("\n") > 1} == {file.name for file in FILES if file.is_document}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("pool.max", "lots", errno.EINVAL),
        ("pool.max", "", errno.EINVAL),
        ("pool.max", "-5M", errno.EINVAL),
        ("pool.max", "1M", errno.ERANGE),
        ("pool.max", "0%", errno.ERANGE),
        ("pool.max", "65M", errno.ERANGE),
        ("pool.max", "200%", errno.ERANGE),
        ("pool.high", "high", errno.EINVAL),
        ("pool.high", "0", errno.ERANGE),
        ("pool.high", "13M", errno.ERANGE),
        ("pool.low", "", errno.EINVAL),
        ("pool.low", "0", errno.ERANGE),
        ("pool.low", "12M", errno.ERANGE),
        ("backing.max", "x", errno.EINVAL),
        ("codec", "lzma", errno.EINVAL),
        ("codec", "zstd:99", errno.EINVAL),
        ("shrink", "0", errno.EINVAL),
        ("shrink", "1M now", errno.EINVAL),
        ("shrink", "1M deadline=soon", errno.EINVAL),
    ],
)
async def test_a_bad_value_has_its_errno_and_changes_nothing(
    files: dict[str, Attribute], name: str, value: str, expected: int
) -> None:
    before = values(files)
    with pytest.raises(TmemfsError) as caught:
        await write(files, name, value)
    assert errno_of(caught.value) == expected
    assert ": " in str(caught.value)  # what is wrong: what to do next
    assert values(files) == before


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("pool.high", "11M\n", f"{11 * MIB}\n"),
        ("pool.high", "12.5%", f"{8 * MIB}\n"),
        ("pool.low", "4M", f"{4 * MIB}\n"),
        ("backing.max", "5M", f"{5 * MIB}\n"),
        ("backing.max", "max", f"{1 << 30}\n"),
        ("backing.max", "50%", f"{1 << 29}\n"),
        ("codec", "zstd:7\n", "lz4 [zstd:7] none\n"),
        ("codec", "none", "lz4 zstd [none]\n"),
        ("codec", "lz4", "[lz4] zstd none\n"),
    ],
)
async def test_a_value_takes_effect_at_once(files: dict[str, Attribute], name: str, value: str, text: str) -> None:
    await write(files, name, value)
    assert read(files, name) == text


async def test_a_higher_pool_max_is_whole_frames_and_its_watermarks_follow(files: dict[str, Attribute]) -> None:
    await write(files, "pool.max", "15.5M")
    found = [int(read(files, name)) for name in ("pool.max", "pool.high", "pool.low")]
    assert found == [15 * MIB, int(13.5 * MIB), 12 * MIB]


async def test_a_watermark_that_was_set_stays_until_it_follows_again(files: dict[str, Attribute]) -> None:
    await write(files, "pool.high", "10M")
    await write(files, "pool.max", "15M")
    assert read(files, "pool.high") == f"{10 * MIB}\n"
    await write(files, "pool.high", "max")
    assert read(files, "pool.high") == f"{int(13.5 * MIB)}\n"


async def test_low_falls_with_high(files: dict[str, Attribute]) -> None:
    await write(files, "pool.high", "2M")
    assert read(files, "pool.low") == f"{2 * MIB}\n"


def test_max_may_be_written_in_capitals(services: Services) -> None:
    services.limits.set_pool_high("MAX")
    services.limits.set_pool_low("MAX")
    assert services.limits.pool.high == int(LIMIT * 0.9)


def test_every_file_reads_as_whole_lines(services: Services, files: dict[str, Attribute]) -> None:
    services.engine.tmem.store(0, [encode(page_of("half", 1), parse_codec("lz4"))])
    assert [name for name in files if not re.fullmatch(r"(.+\n)+", read(files, name))] == []


def test_an_empty_pool_has_no_segments(files: dict[str, Attribute]) -> None:
    assert read(files, "segments") == ""
    assert read(files, "pool.current") == "0\n"


def test_a_segment_is_a_line(services: Services, files: dict[str, Attribute]) -> None:
    services.engine.tmem.store(0, [encode(page_of("raw", number), parse_codec("lz4")) for number in range(128)])
    services.engine.tmem.invalidate(0, 64)
    assert read(files, "segments") == "0 open raw 1 50% 25% 64\n"


@pytest.mark.parametrize("name", ["stat", "events"])
def test_flat_keyed_files_have_a_value_for_every_key(files: dict[str, Attribute], name: Output) -> None:
    pairs = [line.split(" ") for line in read(files, name).splitlines()]
    assert [key for key, _ in pairs] == [metric.name for metric in shown_in(name)]


def test_the_three_files_of_zram_have_its_number_of_fields(files: dict[str, Attribute]) -> None:
    assert {name: len(read(files, name).split()) for name in ("mm_stat", "io_stat", "bd_stat")} == {
        "mm_stat": 9,
        "io_stat": 4,
        "bd_stat": 3,
    }


def test_the_state_says_why_it_is_degraded(services: Services, files: dict[str, Attribute]) -> None:
    assert read(files, "state") == "running\nsignals: fixed\n"
    services.engine.free_frames.set_stuck("the backing is full: raise it")
    for offset in (0, 64, 64):
        services.engine.tmem.damage.note_record(1, offset, "on_tier")
    assert read(files, "state") == (
        "degraded: the backing is full: raise it; loads found 2 damaged records: check the backing device\nsignals: fixed\n"
    )


async def test_damage_is_reported_until_it_is_acknowledged(services: Services, files: dict[str, Attribute]) -> None:
    damage = services.engine.tmem.damage
    damage.note_record(1, 0, "in_ram")
    damage.note_record(1, 64, "on_tier")
    damage.note_failed_read()
    assert read(files, "damage") == "damaged_in_ram 1\ndamaged_on_disk 1\nfailed_reads 1\n"
    assert services.state() == (
        "degraded: loads found 1 records damaged in RAM: test the memory; loads found 1 damaged records: check the backing device; "
        "1 reads from the backing failed: check the backing device"
    )
    with pytest.raises(BadValue, match="write 'acknowledge'"):
        await write(files, "damage", "0")
    assert read(files, "damage").startswith("damaged_in_ram 1\n")
    await write(files, "damage", "acknowledge\n")
    assert read(files, "damage") == "damaged_in_ram 0\ndamaged_on_disk 0\nfailed_reads 0\n"
    assert services.state() == "running"
    damage.note_record(1, 64, "on_tier")  # what is known already
    assert services.state() == "running"
    damage.note_record(2, 64, "on_tier")
    assert services.state() == "degraded: loads found 1 damaged records: check the backing device"


def test_a_daemon_that_is_stopped_is_draining(services: Services) -> None:
    assert replace(services, is_draining=lambda: True).state() == "draining"


def test_a_shrink_never_asked_for_has_an_answer(files: dict[str, Attribute]) -> None:
    assert read(files, "shrink") == "requested 0\nfreed 0\nwritten 0\npages 0\nseconds 0\nreason -\n"


def test_the_smallest_pool_is_ten_frames() -> None:
    assert SMALLEST_POOL_BYTES == 10 * MIB
    assert next("10M at least" in file.help for file in FILES if file.name == "pool.max")
    assert parse_pool_max("10M", RAM) == 10 * MIB
    with pytest.raises(OutOfRange, match="give 10 MiB or more"):
        parse_pool_max(str(10 * MIB - 1), RAM)


def test_a_bad_value_is_a_value_error_too() -> None:
    assert issubclass(BadValue, ValueError) and issubclass(OutOfRange, ValueError)


@pytest.mark.parametrize("name", ["pool.peak", "backing.current"])
def test_one_figure_does_not_compute_all_of_them(
    files: dict[str, Attribute], services: Services, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    expected = {"pool.peak": services.statistics().pool_peak, "backing.current": services.statistics().backing_current}[name]

    def all_of_them(tmem: object) -> None:
        raise AssertionError("all statistics were computed")

    monkeypatch.setattr("tmemfs.services.statistics", all_of_them)
    assert files[name].read() == f"{expected}\n"
