"""Damaged records: each fails its own page, the pages in front of it are given, and a write or discard of the page ends it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import pytest

from tests.parts import FaultyTier, new_limits, new_pressure, new_tmem, page_of
from tmemfs.engine import Engine
from tmemfs.errors import Corrupt, TierError
from tmemfs.jobs.shrink_request import ShrinkRequest
from tmemfs.jobs.supervision import Jobs
from tmemfs.pages.pager import Deferred
from tmemfs.services import Services
from tmemfs.store.codec import parse_codec
from tmemfs.store.consistency import check
from tmemfs.store.record import RECORD_HEADER_BYTES, handle_length, handle_offset, handle_segment
from tmemfs.tiers.tier import Extent
from tmemfs.units import PAGE_BYTES, SECTOR_BYTES, SEGMENT_BYTES

ALL = ShrinkRequest.parse("all")
#: A request of these slots is what swap reads ahead.
FIRST, PAGES = 16, 8
Where = Literal["ram", "tier"]
WHERE: tuple[Where, ...] = ("ram", "tier")
SETS = [(0,), (3,), (7,), (2, 5), (0, 1), (6, 7)]


@dataclass(slots=True)
class BadSectorTier(FaultyTier):
    """A tier that fails calls which touch a bad sector: (extent, number of the sector in it)."""

    bad: set[tuple[Extent, int]] = field(default_factory=set)
    calls: int = 0

    def read(self, extent: Extent, offset: int, into: memoryview, sequence: int) -> None:
        """Read, unless a bad sector is touched."""
        self.calls += 1
        sectors = range(offset // SECTOR_BYTES, (offset + len(into)) // SECTOR_BYTES)
        if any((extent, sector) in self.bad for sector in sectors):
            raise TierError("injected: a bad sector")
        FaultyTier.read(self, extent, offset, into, sequence)


@pytest.fixture
def tier() -> BadSectorTier:
    return BadSectorTier()


@pytest.fixture
def engine(tier: BadSectorTier) -> Engine:
    return Engine.over(partial(new_tmem, slots=1024, frames=16, limit=12, extents=16), tier, parse_codec("lz4"))


@pytest.fixture
def services(engine: Engine) -> Services:
    return Services(engine, new_limits(engine, 32 * SEGMENT_BYTES, 32 * SEGMENT_BYTES), new_pressure(engine), Jobs())


def page(slot: int) -> bytes:
    return page_of("half", slot)


async def fill(engine: Engine, where: Where) -> None:
    assert engine.pager.write(0, memoryview(b"".join(map(page, range(64))))) is None
    if where == "tier":
        assert (await engine.shrinker.shrink(ALL)).reason is None


def damage(engine: Engine, tier: FaultyTier, where: Where, slot: int) -> None:
    """Damage the payload of `slot`, so that neither lz4 nor the checksum takes it."""
    handle = engine.tmem.slots.handles[slot]
    at, size = handle_offset(handle) + RECORD_HEADER_BYTES, handle_length(handle)
    if where == "ram":
        base = engine.tmem.segments.base[handle_segment(handle)]
        engine.tmem.arena.view[base + at : base + at + size] = b"\xff" * size
        return
    extent = engine.tmem.segments.extent(handle_segment(handle))
    data = bytearray(tier.inner.extents[extent])
    data[at : at + size] = b"\xff" * size
    tier.inner.extents[extent] = bytes(data)


def run(result: bytes | Deferred | None) -> bytes | None:
    return result.run() if isinstance(result, Deferred) else result


def read(engine: Engine, offset: int, size: int) -> bytes:
    """As the page path does. Raises Corrupt, TierError."""
    data = run(engine.pager.read(offset, size))
    assert data is not None
    return data


def given(engine: Engine, first: int, count: int) -> int:
    """How many of `count` pages from `first` on one read gives. They are verified."""
    data = read(engine, first * PAGE_BYTES, count * PAGE_BYTES)
    pages = len(data) // PAGE_BYTES
    assert data == b"".join(map(page, range(first, first + pages)))
    return pages


@pytest.mark.parametrize("bad", SETS)
@pytest.mark.parametrize("where", WHERE)
async def test_a_read_gives_the_pages_in_front_of_a_damaged_one(
    engine: Engine, tier: BadSectorTier, services: Services, where: Where, bad: tuple[int, ...]
) -> None:
    await fill(engine, where)
    for at in bad:
        damage(engine, tier, where, FIRST + at)
    start, failed = 0, []
    while start < PAGES:  # as somebody reads who skips what fails
        try:
            start += given(engine, FIRST + start, PAGES - start)
        except Corrupt:
            failed.append(start)
            start += 1
    assert tuple(failed) == bad
    # each damaged record counts once, though it was met several times
    found = services.engine.tmem.damage.since_acknowledged
    assert (found.in_ram, found.on_tier, found.failed_reads) == ((len(bad), 0, 0) if where == "ram" else (0, len(bad), 0))
    assert engine.tmem.counts.damaged_in_ram + engine.reader.counts.corrupt == len(bad)
    assert engine.tmem.segments.pins == {} and engine.reader.waiting == 0
    check(engine.tmem)


async def test_a_damaged_page_in_ram_saves_those_in_front_that_are_on_the_tier(engine: Engine, tier: BadSectorTier) -> None:
    await fill(engine, "tier")
    engine.pager.write((FIRST + 4) * PAGE_BYTES, memoryview(b"".join(page(FIRST + at) for at in range(4, 8))))
    damage(engine, tier, "ram", FIRST + 6)
    assert given(engine, FIRST, PAGES) == 6
    damage(engine, tier, "tier", FIRST + 2)
    assert given(engine, FIRST, PAGES) == 2
    assert engine.tmem.segments.pins == {}


@pytest.mark.parametrize("where", WHERE)
async def test_a_read_at_any_offset_ends_where_the_damaged_page_begins(engine: Engine, tier: BadSectorTier, where: Where) -> None:
    await fill(engine, where)
    damage(engine, tier, where, 3)
    whole = b"".join(map(page, range(3)))
    assert read(engine, 512, 5 * PAGE_BYTES) == whole[512:]
    assert read(engine, 2 * PAGE_BYTES + 100, 2 * PAGE_BYTES) == whole[2 * PAGE_BYTES + 100 :]
    with pytest.raises(Corrupt):
        read(engine, 3 * PAGE_BYTES + 100, 4 * PAGE_BYTES)


@pytest.mark.parametrize("where", WHERE)
async def test_a_read_of_a_page_at_most_is_never_short(engine: Engine, tier: BadSectorTier, where: Where) -> None:
    await fill(engine, where)
    damage(engine, tier, where, 3)
    with pytest.raises(Corrupt):
        read(engine, 3 * PAGE_BYTES - 512, PAGE_BYTES)
    assert read(engine, 3 * PAGE_BYTES - 512, 512) == page(2)[-512:]
    end = engine.pager.swap_bytes
    assert len(read(engine, end - 512, PAGE_BYTES)) == 512  # at the end of the image it is, as ever
    assert engine.tmem.segments.pins == {}


async def test_a_bad_sector_fails_the_records_in_it_alone(engine: Engine, tier: BadSectorTier, services: Services) -> None:
    await fill(engine, "tier")
    handle = engine.tmem.slots.handles[FIRST + 3]
    extent = engine.tmem.segments.extent(handle_segment(handle))
    # the middle of the record: its neighbours do not reach this sector
    tier.bad.add((extent, (handle_offset(handle) + handle_length(handle) // 2) // SECTOR_BYTES))
    assert given(engine, FIRST, PAGES) == 3
    with pytest.raises(TierError):
        given(engine, FIRST + 3, PAGES - 3)
    assert given(engine, FIRST + 4, PAGES - 4) == PAGES - 4
    assert engine.tmem.damage.since_acknowledged.failed_reads == engine.reader.counts.failed == 2
    assert services.state() == "degraded: 2 reads from the backing failed: check the backing device"
    assert engine.tmem.segments.pins == {}


async def test_a_tier_that_fails_is_not_asked_for_every_page(engine: Engine, tier: BadSectorTier) -> None:
    await fill(engine, "tier")
    tier.fail("read")
    before = tier.calls
    with pytest.raises(TierError):
        given(engine, FIRST, PAGES)
    assert tier.calls - before == 2  # together, then the first one alone
    tier.fail()
    assert given(engine, FIRST, PAGES) == PAGES


def _overwrite(engine: Engine) -> bytes:
    assert engine.pager.write(3 * PAGE_BYTES, memoryview(page(99))) is None
    return page(99)


def _discard(engine: Engine) -> bytes:
    assert engine.pager.discard(3 * PAGE_BYTES, PAGE_BYTES) is None
    return bytes(PAGE_BYTES)


@pytest.mark.parametrize("heal", [_overwrite, _discard])
@pytest.mark.parametrize("where", WHERE)
async def test_a_damaged_page_is_whole_again_after(
    engine: Engine, tier: BadSectorTier, where: Where, heal: Callable[[Engine], bytes]
) -> None:
    await fill(engine, where)
    damage(engine, tier, where, 3)
    with pytest.raises(Corrupt):
        read(engine, 3 * PAGE_BYTES, PAGE_BYTES)
    expected = heal(engine)
    assert read(engine, 2 * PAGE_BYTES, 3 * PAGE_BYTES) == page(2) + expected + page(4)
    check(engine.tmem)


@pytest.mark.parametrize("where", WHERE)
async def test_a_part_is_not_written_into_a_damaged_page(engine: Engine, tier: BadSectorTier, where: Where) -> None:
    await fill(engine, where)
    damage(engine, tier, where, 3)
    with pytest.raises(Corrupt):
        run(engine.pager.write(3 * PAGE_BYTES + 512, memoryview(b"x" * 512)))
    with pytest.raises(Corrupt):
        run(engine.pager.discard(3 * PAGE_BYTES + 512, 512))
    with pytest.raises(Corrupt):  # still: what was written would have been lost among unknown bytes
        read(engine, 3 * PAGE_BYTES, PAGE_BYTES)
    assert given(engine, 4, 4) == 4
    run(engine.pager.write(512, memoryview(b"x" * 512)))
    assert read(engine, 0, PAGE_BYTES) == page(0)[:512] + b"x" * 512 + page(0)[1024:]
    assert engine.pager.write(0, memoryview(page(0))) is None  # no store is held up behind those that failed
    check(engine.tmem)


@pytest.mark.parametrize("shrinks", [False, True])
async def test_a_record_damaged_in_ram_is_one_record_also_after_it_was_written_back(engine: Engine, tier: BadSectorTier,
                                                                                    shrinks: bool) -> None:  # fmt: skip
    await fill(engine, "ram")
    damage(engine, tier, "ram", 3)
    with pytest.raises(Corrupt):
        read(engine, 3 * PAGE_BYTES, PAGE_BYTES)
    if shrinks:
        await engine.shrinker.shrink(ALL)
    with pytest.raises(Corrupt):
        read(engine, 3 * PAGE_BYTES, PAGE_BYTES)
    assert (engine.tmem.counts.damaged_in_ram, engine.reader.counts.corrupt) == (1, 0)
    for slot in (*range(3), *range(4, 64)):
        assert read(engine, slot * PAGE_BYTES, PAGE_BYTES) == page(slot)
