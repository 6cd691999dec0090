"""The engine while its tier fails, delays, tears, is full: nothing is lost, nothing waits for ever, and it recovers."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial

import pytest
import trio

from tests.parts import FaultyTier, Kind, new_limits, new_pressure, new_tmem, page_of
from tests.waiting import HANG_S
from tmemfs.engine import Engine
from tmemfs.errors import BackingFull, Busy, Corrupt, NoSpace, TierError
from tmemfs.jobs import shrinker as shrinker_module
from tmemfs.jobs.shrink_request import ShrinkRequest, Tally
from tmemfs.jobs.supervision import Jobs
from tmemfs.pages.pager import Deferred
from tmemfs.policy.writers import Writers
from tmemfs.services import Services
from tmemfs.store.codec import parse_codec
from tmemfs.store.consistency import check
from tmemfs.store.statistics import statistics
from tmemfs.system.memory import populate
from tmemfs.tiers.tier import MOST_WRITERS
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES

ALL = ShrinkRequest.parse("all")
LIMIT = 12
PAGES_A_SEGMENT = SEGMENT_BYTES // (PAGE_BYTES + 16)


@pytest.fixture(params=[False, True], ids=["one writes", "two write"])
def tier(request: pytest.FixtureRequest) -> FaultyTier:
    return FaultyTier(is_encrypted=request.param)


@pytest.fixture
def engine(tier: FaultyTier, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr("tmemfs.jobs.reserve.FRAME_S", 5.0)  # a busy machine delays frames; none is to be given up here
    return Engine.over(partial(new_tmem, slots=8192, frames=32, limit=LIMIT, extents=32), tier, parse_codec("lz4"))


@pytest.fixture
def services(engine: Engine) -> Services:
    return Services(engine, new_limits(engine, 32 * SEGMENT_BYTES, 32 * SEGMENT_BYTES), new_pressure(engine), Jobs())


@pytest.fixture
async def background(engine: Engine, nursery: trio.Nursery) -> AsyncIterator[None]:
    nursery.start_soon(engine.shrinker.run)
    yield
    nursery.cancel_scope.cancel()


def fill_reserve(engine: Engine) -> None:
    """What the background does; otherwise the frames of the first segments written back would fill it."""
    while plan := engine.tmem.reclaim.plan_populate():
        populate(engine.tmem.arena.region.map, plan.frame * SEGMENT_BYTES, SEGMENT_BYTES)
        engine.tmem.reclaim.commit_populate(plan)


def raw(number: int) -> bytes:
    return page_of("raw", number)


async def finish(result: bytes | Deferred | None) -> bytes | None:
    return await trio.to_thread.run_sync(result.run) if isinstance(result, Deferred) else result


async def store(engine: Engine, first: int, count: int) -> None:
    """Store raw pages, 16 at a time."""
    for start in range(first, first + count, 16):
        data = b"".join(raw(number) for number in range(start, start + 16))
        await finish(engine.pager.write(start * PAGE_BYTES, memoryview(data)))


async def fill_up(engine: Engine, tier: FaultyTier) -> None:
    """Store until there is no free frame, on a tier that fails; also where one was still being faulted in at the first refusal."""
    tier.fail("write")
    with pytest.raises(NoSpace):
        await store(engine, 16, 4000)
    await until(lambda: not engine.tmem.arena.is_growing)
    with suppress(NoSpace):
        await store(engine, 4096, 4000)
    assert not engine.tmem.arena.has_free_frame


async def load(engine: Engine, slot: int) -> bytes | None:
    """As the relay does, page by page; several pages and parts of them are read in the model and through a mount."""
    page = engine.pager.load_page(slot)
    return await trio.to_thread.run_sync(engine.pager.read_page, slot) if page is None else page


async def verify(engine: Engine, count: int) -> None:
    for slot in range(count):
        assert await load(engine, slot) == raw(slot), slot
    check(engine.tmem)


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(HANG_S):
        while not condition():
            await trio.sleep(0.005)


async def test_a_failed_write_keeps_the_pages_in_ram_and_says_so(engine: Engine, tier: FaultyTier, services: Services) -> None:
    await store(engine, 0, 1024)
    tier.fail("write")
    answer = await engine.shrinker.shrink(ALL)
    assert (answer.freed, answer.reason) == (0, "injected: the tier failed")
    assert services.state() == "degraded: injected: the tier failed"
    assert statistics(engine.tmem).pages_on_disk == 0
    await verify(engine, 1024)


async def test_a_torn_write_is_not_read_back(engine: Engine, tier: FaultyTier) -> None:
    await store(engine, 0, 1024)
    tier.fail("write")
    tier.tears = True
    await engine.shrinker.shrink(ALL)
    await verify(engine, 1024)
    tier.tears = False
    tier.fail()
    assert (await engine.shrinker.shrink(ALL)).reason is None
    await verify(engine, 1024)


async def test_service_returns_when_the_tier_does(
    background: None, engine: Engine, tier: FaultyTier, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shrinker_module, "RETRY_S", 0.01)
    tier.fail("write")
    with pytest.raises(NoSpace):
        await store(engine, 0, 8000)
    kept = engine.tmem.pages_stored
    assert services.state().startswith("degraded") and engine.pager.refused == 1
    await verify(engine, kept)
    tier.fail()
    await until(lambda: services.state() == "running")
    await store(engine, 0, 6000)
    await verify(engine, 6000)


async def test_a_full_backing_refuses_stores_and_goes_on_loading(background: None, engine: Engine, services: Services) -> None:
    services.limits.set_backing_max("2M")
    with pytest.raises(NoSpace, match="raise backing"):
        await store(engine, 0, 8000)
    assert services.state().startswith("degraded: the backing is full")
    await verify(engine, engine.tmem.pages_stored)
    assert statistics(engine.tmem).backing_current <= 2 * SEGMENT_BYTES
    services.limits.set_backing_max("max")
    await until(lambda: services.state() == "running")
    await store(engine, 0, 6000)
    await verify(engine, 6000)


async def test_space_that_died_on_a_full_backing_is_used_again(background: None, engine: Engine, services: Services) -> None:
    services.limits.set_backing_max("4M")
    with pytest.raises(NoSpace):
        await store(engine, 0, 8000)
    await finish(engine.pager.discard(0, 2048 * PAGE_BYTES))
    await until(lambda: services.state() == "running")
    await store(engine, 0, 512)
    assert await load(engine, 17) == raw(17)


async def test_a_full_tier_counts_as_full(background: None, engine: Engine, tier: FaultyTier, services: Services) -> None:
    def full() -> None:
        raise BackingFull("the disk is full: free space")

    tier.before["write"] = full
    with pytest.raises(NoSpace, match="the disk is full"):
        await store(engine, 0, 8000)
    await verify(engine, engine.tmem.pages_stored)


async def test_a_refused_whole_page_forgets_its_old_content(background: None, engine: Engine, tier: FaultyTier) -> None:
    await store(engine, 0, 16)
    await fill_up(engine, tier)
    with pytest.raises(NoSpace):
        await finish(engine.pager.write(0, memoryview(page_of("raw", 99))))
    assert await load(engine, 0) == bytes(PAGE_BYTES)
    assert await load(engine, 1) == raw(1)


async def test_a_refused_part_leaves_the_page_as_it_was(background: None, engine: Engine, tier: FaultyTier) -> None:
    await store(engine, 0, 16)
    await fill_up(engine, tier)
    with pytest.raises(NoSpace):
        await finish(engine.pager.write(512, memoryview(b"x" * 512)))
    assert await load(engine, 0) == raw(0)


async def test_a_flipped_bit_on_the_tier_fails_that_load_only(engine: Engine, tier: FaultyTier, services: Services) -> None:
    await store(engine, 0, 1024)
    await engine.shrinker.shrink(ALL)
    extent, data = next(iter(tier.inner.extents.items()))
    damaged = bytearray(data)
    damaged[5 * PAGE_BYTES + 100] ^= 1
    tier.inner.extents[extent] = bytes(damaged)
    failed = []
    for slot in range(1024):
        try:
            assert await load(engine, slot) == raw(slot)
        except Corrupt:
            failed.append(slot)
    assert len(failed) == 1
    assert engine.reader.counts.corrupt == 1
    assert services.state().startswith("degraded: loads found 1 damaged records")


async def test_a_read_that_fails_pins_nothing(engine: Engine, tier: FaultyTier, services: Services) -> None:
    await store(engine, 0, 300)
    await engine.shrinker.shrink(ALL)
    tier.fail("read")
    for _ in range(3):
        with pytest.raises(TierError):
            await load(engine, 7)
    assert (engine.reader.counts.failed, engine.reader.waiting, engine.tmem.segments.pins) == (3, 0, {})
    assert services.state().startswith("degraded: 3 reads from the backing failed")
    tier.fail()
    assert await load(engine, 7) == raw(7)


async def test_a_page_that_is_stored_anew_just_before_it_is_read_is_the_new_one(engine: Engine) -> None:
    await store(engine, 0, 300)
    await engine.shrinker.shrink(ALL)
    assert engine.pager.load_page(7) is None
    engine.pager.write(7 * PAGE_BYTES, memoryview(raw(1007)))
    assert engine.pager.read_page(7) == raw(1007)
    engine.tmem.invalidate(7, 1)
    assert engine.pager.read_page(7) == bytes(PAGE_BYTES)


@pytest.mark.parametrize("sector", [512, 4096])
async def test_a_load_reads_the_sectors_of_its_record_and_no_more(engine: Engine, tier: FaultyTier, sector: int) -> None:
    tier.sector_bytes = sector
    kinds: tuple[Kind, ...] = ("half", "text", "raw")
    for number in range(300):
        await finish(engine.pager.write(number * PAGE_BYTES, memoryview(page_of(kinds[number % 3], number))))
    await engine.shrinker.shrink(ALL)
    for number in range(300):
        before = engine.reader.counts.read_bytes
        assert await load(engine, number) == page_of(kinds[number % 3], number)
        length = {"half": 2100, "text": 60, "raw": PAGE_BYTES}[kinds[number % 3]] + 12
        read = engine.reader.counts.read_bytes - before
        assert read % sector == 0 and read < length + 2 * sector


async def test_a_lost_write_is_found(engine: Engine, tier: FaultyTier) -> None:
    """The tier acknowledges a write but keeps what it had there: an older segment's records verify nowhere else."""
    await store(engine, 0, PAGES_A_SEGMENT)
    await engine.shrinker.shrink(ALL)
    older = dict(tier.inner.extents)
    await finish(engine.pager.discard(0, 8192 * PAGE_BYTES))
    assert (await engine.shrinker.shrink(ALL)).reason is None
    await store(engine, 0, PAGES_A_SEGMENT)
    await engine.shrinker.shrink(ALL)
    assert tier.inner.extents.keys() == older.keys()
    tier.inner.extents.update(older)
    with pytest.raises(Corrupt):
        await load(engine, 3)


async def test_failed_reads_are_counted_and_pass(engine: Engine, tier: FaultyTier, services: Services) -> None:
    await store(engine, 0, 512)
    await engine.shrinker.shrink(ALL)
    tier.fail("read")
    with pytest.raises(TierError):
        await load(engine, 0)
    assert "1 reads from the backing failed" in services.state()
    tier.fail()
    await verify(engine, 512)


async def test_holes_that_could_not_be_punched_are_punched_later(engine: Engine, tier: FaultyTier) -> None:
    await store(engine, 0, 1024)
    await engine.shrinker.shrink(ALL)
    tier.fail("discard")
    await finish(engine.pager.discard(0, 1024 * PAGE_BYTES))
    await engine.shrinker.shrink(ALL)
    assert tier.inner.extents and engine.holes.counts.discard_errors
    tier.fail()
    await engine.shrinker.shrink(ALL)
    assert not tier.inner.extents
    assert statistics(engine.tmem).backing_current == 0


async def test_memory_that_cannot_be_given_back_stays_counted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    await store(engine, 0, 2048)
    before = engine.tmem.pool_bytes
    with monkeypatch.context() as patch:
        patch.setattr(shrinker_module, "punch", fails)
        await engine.shrinker.shrink(ALL)
        assert engine.tmem.pool_bytes == before
    await engine.shrinker.shrink(ALL)
    assert engine.tmem.pool_bytes < before
    await verify(engine, 2048)


async def test_memory_goes_only_after_its_write_completed(engine: Engine, tier: FaultyTier, nursery: trio.Nursery) -> None:
    await store(engine, 0, 2048)
    release, region = threading.Event(), engine.tmem.arena.region
    tier.before["write"] = lambda: (release.wait(HANG_S), None)[1]
    resident = region.resident_bytes()
    nursery.start_soon(engine.shrinker.shrink, ALL)
    await until(lambda: _being_written(engine) >= 1)
    assert region.resident_bytes() == resident
    assert engine.tmem.load(3) == raw(3)
    release.set()
    await until(lambda: region.resident_bytes() < resident // 2)


def _being_written(engine: Engine) -> int:
    with engine.tmem.lock:
        return len(engine.tmem.extents.out)


async def test_a_slow_tier_holds_up_no_load_from_ram(engine: Engine, tier: FaultyTier, nursery: trio.Nursery) -> None:
    await store(engine, 0, 512)
    await engine.shrinker.shrink(ALL)
    await store(engine, 1024, 16)
    release = threading.Event()
    tier.before["read"] = lambda: (release.wait(HANG_S), None)[1]
    loaded: list[bytes | None] = []

    async def load_from_disk() -> None:
        loaded.append(await load(engine, 0))

    nursery.start_soon(load_from_disk)
    await until(lambda: engine.tmem.segments.pins)
    assert engine.pager.read(1024 * PAGE_BYTES, PAGE_BYTES) == raw(1024)
    assert not loaded  # the one before it still waits for the tier
    release.set()
    await until(lambda: loaded)
    assert loaded == [raw(0)]


async def test_a_page_discarded_while_it_is_read_is_still_read(engine: Engine, tier: FaultyTier) -> None:
    await store(engine, 0, 64)
    await engine.shrinker.shrink(ALL)
    reading = engine.pager.read(0, PAGE_BYTES)
    await finish(engine.pager.discard(0, 64 * PAGE_BYTES))
    await engine.shrinker.shrink(ALL)
    assert tier.inner.extents
    assert await finish(reading) == raw(0)
    await engine.shrinker.shrink(ALL)
    assert not tier.inner.extents


async def test_the_limit_is_never_passed(background: None, engine: Engine) -> None:
    most = 0
    for first in range(0, 8000, 64):
        await store(engine, first, 64)
        most = max(most, engine.tmem.arena.region.resident_bytes())
    assert most <= LIMIT * SEGMENT_BYTES
    assert statistics(engine.tmem).pool_peak <= LIMIT * SEGMENT_BYTES
    await verify(engine, 8000)


async def test_pages_behind_a_part_that_fails_are_forgotten_too(engine: Engine, tier: FaultyTier) -> None:
    await store(engine, 0, 16)
    await engine.shrinker.shrink(ALL)
    tier.fail("read")
    with pytest.raises(TierError):
        await finish(engine.pager.write(512, memoryview(b"x" * (PAGE_BYTES - 512 + 2 * PAGE_BYTES))))
    tier.fail()
    assert [await load(engine, slot) for slot in range(4)] == [raw(0), bytes(PAGE_BYTES), bytes(PAGE_BYTES), raw(3)]


async def test_a_shrink_that_tries_nothing_leaves_the_state(engine: Engine, tier: FaultyTier, services: Services) -> None:
    await store(engine, 0, 1024)
    tier.fail("write")
    await engine.shrinker.shrink(ALL)
    await engine.shrinker.shrink(ShrinkRequest.parse("all deadline=0"))
    assert services.state() == "degraded: injected: the tier failed"


async def test_a_full_pool_is_shrunk_whatever_the_watermarks(background: None, engine: Engine, services: Services) -> None:
    services.limits.set_pool_high(str(LIMIT * SEGMENT_BYTES))
    services.limits.set_pool_low(str(LIMIT * SEGMENT_BYTES))
    with trio.fail_after(HANG_S):
        await store(engine, 0, 6000)
    await verify(engine, 6000)


async def test_a_lower_limit_is_not_shown_before_it_is_reached(
    engine: Engine, tier: FaultyTier, services: Services, nursery: trio.Nursery
) -> None:
    await store(engine, 0, 2560)
    release = threading.Event()
    tier.before["write"] = lambda: (release.wait(HANG_S), None)[1]
    nursery.start_soon(services.limits.set_pool_max, "10M")
    await until(lambda: _being_written(engine))
    assert services.limits.pool.max == LIMIT * SEGMENT_BYTES
    release.set()
    await until(lambda: services.limits.pool.max == 10 * SEGMENT_BYTES)
    assert engine.tmem.pool_bytes <= 10 * SEGMENT_BYTES


async def test_a_deadline_ends_a_shrink(engine: Engine, tier: FaultyTier) -> None:
    await store(engine, 0, 2560)
    tier.before["write"] = lambda: time.sleep(0.03)
    answer = await engine.shrinker.shrink(ShrinkRequest.parse("all deadline=50ms"))
    assert answer.reason == "the deadline passed"
    assert answer.pages < 2560
    await verify(engine, 2560)


async def test_a_shrink_that_is_cancelled_as_it_begins_ends(background: None, engine: Engine) -> None:
    """Between its two threads, in whichever order they start: neither may wait for one that never runs."""
    for steps in range(100):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.shrinker.shrink, ALL)
            for _ in range(steps % 5):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()


async def test_a_shrink_frees_what_it_was_asked_for(engine: Engine) -> None:
    await store(engine, 0, 2560)
    fill_reserve(engine)
    before = engine.tmem.arena.region.resident_bytes()
    answer = await engine.shrinker.shrink(ShrinkRequest.parse("3M"))
    assert (answer.freed, answer.reason) == (3 * SEGMENT_BYTES, None)
    assert before - engine.tmem.arena.region.resident_bytes() == 3 * SEGMENT_BYTES


async def test_the_oldest_segments_leave_first(engine: Engine) -> None:
    for number in range(2048):
        await finish(engine.pager.write(number * PAGE_BYTES, memoryview(page_of("half", number))))
    fill_reserve(engine)
    await engine.shrinker.shrink(ShrinkRequest.parse("1M"))
    on_disk = [slot for slot in range(2048) if engine.tmem.load(slot) is None]
    assert on_disk == list(range(len(on_disk))) and on_disk


async def test_incompressible_pages_leave_first(engine: Engine) -> None:
    for number in range(1024):
        await finish(engine.pager.write(number * PAGE_BYTES, memoryview(page_of("half", number))))
    await store(engine, 4096, 1024)
    fill_reserve(engine)
    await engine.shrinker.shrink(ShrinkRequest.parse("2M"))
    assert [slot for slot in range(1024) if engine.tmem.load(slot) is None] == []
    assert engine.tmem.load(4096) is None


async def test_a_shrink_neither_compresses_nor_decompresses(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1024):
        await finish(engine.pager.write(number * PAGE_BYTES, memoryview(page_of("half", number))))

    def forbidden(*_: object, **__: object) -> bytes:
        raise AssertionError("a shrink must not run a codec")

    with monkeypatch.context() as patch:
        patch.setattr("lz4.block.compress", forbidden)
        patch.setattr("lz4.block.decompress", forbidden)
        assert (await engine.shrinker.shrink(ALL)).reason is None
    assert await load(engine, 5) == page_of("half", 5)


async def test_a_lower_limit_is_reached_before_it_is_set(background: None, engine: Engine, services: Services) -> None:
    await store(engine, 0, 2048)
    await services.limits.set_pool_max("10M")
    assert engine.tmem.pool_bytes <= 10 * SEGMENT_BYTES
    assert engine.tmem.arena.region.resident_bytes() <= 10 * SEGMENT_BYTES
    await verify(engine, 2048)


async def test_a_limit_that_cannot_be_reached_stays(engine: Engine, tier: FaultyTier, services: Services) -> None:
    await store(engine, 0, 2560)
    tier.fail("write")
    with pytest.raises(Busy, match="stays 12582912"):
        await services.limits.set_pool_max("10M")
    assert services.limits.pool.max == LIMIT * SEGMENT_BYTES
    assert engine.tmem.arena.limit == LIMIT
    await verify(engine, 2560)


async def test_holes_that_can_never_be_punched_do_not_fill_the_backing(
    engine: Engine, tier: FaultyTier, services: Services
) -> None:
    """Three times what the backing holds goes through it, and all of it dies: nothing is full."""
    tier.fail("discard")
    for round_ in range(12):
        await store(engine, 0, 2048)
        assert (await engine.shrinker.shrink(ALL)).reason is None, round_
        await finish(engine.pager.discard(0, 8192 * PAGE_BYTES))
    assert engine.holes.counts.discard_errors and services.state() == "running"
    assert len(tier.inner.extents) <= 20  # as many as lived at once, and those that died before and were not tried yet
    tier.fail()
    await engine.shrinker.shrink(ALL)
    assert not tier.inner.extents and statistics(engine.tmem).backing_current == 0


async def test_holes_that_fail_now_and_then_are_all_punched_in_the_end(
    engine: Engine, tier: FaultyTier, background: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tmemfs.jobs.holes.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("tmemfs.jobs.holes.LONGEST_PAUSE_S", 0.05)
    engine.holes._pause_s = 0.01
    calls = iter(range(1 << 30))

    def fails_mostly() -> None:
        if next(calls) % 4:
            raise TierError("injected: the tier failed")

    tier.before["discard"] = fails_mostly
    for _ in range(4):
        await store(engine, 0, 2048)
        assert (await engine.shrinker.shrink(ALL)).reason is None
        await finish(engine.pager.discard(0, 8192 * PAGE_BYTES))
    await until(lambda: not tier.inner.extents)
    assert engine.holes.counts.discard_errors and not statistics(engine.tmem).backing_current


@pytest.mark.parametrize("found_out", ["at the start", "at the first hole"])
async def test_on_a_tier_that_cannot_discard_an_extent_is_free_at_once(found_out: str) -> None:
    tier = FaultyTier(can_discard=found_out == "at the first hole")
    engine = Engine.over(partial(new_tmem, slots=8192, frames=32, limit=LIMIT, extents=12), tier, parse_codec("lz4"))
    tier.before["discard"] = lambda: setattr(tier, "can_discard", False)
    for round_ in range(8):
        await store(engine, 0, 2048)
        assert (await engine.shrinker.shrink(ALL)).reason is None, round_
        await finish(engine.pager.discard(0, 8192 * PAGE_BYTES))
    await engine.shrinker.shrink(ALL)
    assert statistics(engine.tmem).backing_current == engine.tmem.extents.retired_bytes == 0
    assert (engine.holes.counts.discard_errors, engine.holes.counts.discarded) == (0, 0)
    await store(engine, 0, 2048)
    await engine.shrinker.shrink(ALL)
    await verify(engine, 2048)


async def test_what_is_dead_but_not_punched_yet_does_not_make_the_backing_full(tier: FaultyTier) -> None:
    engine = Engine.over(partial(new_tmem, slots=8192, frames=32, limit=LIMIT, extents=10), tier, parse_codec("lz4"))
    await store(engine, 0, 2048)
    await engine.shrinker.shrink(ALL)
    await store(engine, 4096, 2048)  # it does not fit beside the first pages, which are discarded
    await finish(engine.pager.discard(0, 2048 * PAGE_BYTES))
    assert (await engine.shrinker.shrink(ALL)).reason is None


async def test_a_pool_above_its_watermark_is_written_back_whether_or_not_the_kernel_gives_frames(
    engine: Engine, tier: FaultyTier, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wait(wait_s: float) -> bool:
        await trio.sleep_forever()
        return False

    await store(engine, 0, (LIMIT - 1) * PAGES_A_SEGMENT)
    monkeypatch.setattr(engine.reserve, "has_frame_soon", wait)
    nursery.start_soon(engine.shrinker.run)
    await until(lambda: tier.inner.extents)
    nursery.cancel_scope.cancel()


async def test_segments_are_written_one_after_another_while_stores_wait_and_loads_pass(
    background: None, engine: Engine, tier: FaultyTier
) -> None:
    """On a slow tier: the next write begins without a notice, a store or a timer, and loads are answered in the middle of each."""
    begun, goes_on = threading.Semaphore(0), threading.Semaphore(0)

    def slow() -> None:
        begun.release()
        assert goes_on.acquire(timeout=HANG_S)

    await store(engine, 0, 4 * PAGES_A_SEGMENT)
    await engine.shrinker.shrink(ALL)
    tier.before["write"] = slow
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store, engine, 1024, 24 * PAGES_A_SEGMENT)
        for _ in range(12):
            assert await trio.to_thread.run_sync(begun.acquire, True, HANG_S)
            assert await load(engine, 0) == raw(0)
            goes_on.release()
        tier.before.clear()
        for _ in range(2 * LIMIT):  # who has begun meanwhile
            goes_on.release()
    check(engine.tmem)


async def test_a_step_that_was_over_before_it_began_is_made_again(
    engine: Engine, tier: FaultyTier, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine; no notice comes for a pool that stays as it is."""
    steps, claim = list[Tally](), Tally.claim
    monkeypatch.setattr(shrinker_module, "STEP_S", -1.0)
    monkeypatch.setattr(Tally, "claim", noting(steps, claim))
    await store(engine, 0, (LIMIT - 1) * PAGES_A_SEGMENT)
    nursery.start_soon(engine.shrinker.run)
    await until(lambda: steps)
    monkeypatch.setattr(shrinker_module, "STEP_S", 0.5)
    await until(lambda: tier.inner.extents)
    nursery.cancel_scope.cancel()


async def test_writes_under_way_at_once_fail_and_succeed_each_for_itself(engine: Engine, tier: FaultyTier) -> None:
    """As many as the policy allows; those that fail keep their pages in RAM, and the next shrink writes them."""
    together, failing = threading.Barrier(MOST_WRITERS), iter([True, False] + [True] * (MOST_WRITERS - 2))

    def meet() -> None:
        together.wait(HANG_S)
        if next(failing, False):
            raise TierError("injected: the tier failed")

    await store(engine, 0, 1024)
    engine.shrinker.writers = Writers.first(MOST_WRITERS, MOST_WRITERS, MOST_WRITERS)
    tier.before["write"] = meet
    answer = await engine.shrinker.shrink(ShrinkRequest(MOST_WRITERS * SEGMENT_BYTES))
    assert answer.reason == "injected: the tier failed" and len(tier.inner.extents) == 1
    assert engine.shrinker.counts.write_errors == MOST_WRITERS - 1
    await verify(engine, 1024)
    tier.fail()
    assert (await engine.shrinker.shrink(ALL)).reason is None
    await verify(engine, 1024)


def noting(tallies: list[Tally], claim: Callable[[Tally], bool]) -> Callable[[Tally], bool]:
    """`claim`, but that it notes whose it is."""

    def noted(tally: Tally) -> bool:
        tallies.append(tally)
        return claim(tally)

    return noted


@pytest.mark.parametrize("tier", [False], ids=["one writes"], indirect=True)  # two would go on writing until both are told
async def test_a_shrink_that_is_interrupted_says_how_far_it_came(
    engine: Engine, tier: FaultyTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store(engine, 0, 2048)
    fill_reserve(engine)
    token, calls, tallies = trio.lowlevel.current_trio_token(), iter(range(100)), list[Tally]()
    monkeypatch.setattr(Tally, "claim", noting(tallies, Tally.claim))

    def stopped() -> bool:
        return tallies[-1].is_to_end

    with trio.CancelScope() as scope:

        def interrupt() -> None:
            if next(calls) == 2:
                trio.from_thread.run_sync(scope.cancel, trio_token=token)
                while not stopped():
                    trio.from_thread.run_sync(lambda: None, trio_token=token)

        tier.before["write"] = interrupt
        await engine.shrinker.shrink(ALL)
    last = engine.shrinker.last
    assert scope.cancelled_caught and last is not None
    assert (last.reason, last.written) == ("interrupted", 3 * SEGMENT_BYTES)
    assert engine.tmem.has_victims
    await verify(engine, 2048)


async def test_a_shrink_that_waits_for_another_one_can_be_interrupted(engine: Engine, tier: FaultyTier) -> None:
    await store(engine, 0, 2048)
    writing, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        writing.set()
        assert go_on.wait(HANG_S)

    tier.before["write"] = hold
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.shrinker.shrink, ALL)
        await until(writing.is_set)
        with trio.move_on_after(0.05) as scope:
            await engine.shrinker.shrink(ALL)
        assert scope.cancelled_caught and engine.shrinker.last is None
        go_on.set()
    assert engine.shrinker.last is not None and engine.shrinker.last.reason is None


def waiting_store(engine: Engine) -> Deferred:
    """A store that found no free frame. Nothing runs in the background."""
    for slot in range(0, 8192, 16):
        data = memoryview(b"".join(map(raw, range(slot, slot + 16))))
        if (deferred := engine.pager.write(slot * PAGE_BYTES, data)) is not None:
            return deferred
    raise AssertionError("the pool never became full")


class WatchedCondition:
    """A condition that tells before each wait whether it will wait, and ends the store that waits."""

    def __init__(self, engine: Engine) -> None:
        self._frames = engine.free_frames
        self._condition = threading.Condition()
        self.would_wait: list[bool] = []

    def __enter__(self) -> bool:
        return self._condition.acquire()

    def __exit__(self, *error: object) -> None:
        self._condition.release()

    def notify_all(self) -> None:
        self._condition.notify_all()

    def wait_for(self, predicate: Callable[[], bool], timeout: float) -> None:
        self.would_wait.append(not predicate())
        self._frames._stuck = "the end of the test"


def test_a_store_that_waits_is_not_woken_by_its_own_attempt(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    deferred = waiting_store(engine)
    condition = WatchedCondition(engine)
    monkeypatch.setattr(engine.free_frames, "_changed", condition)
    with pytest.raises(NoSpace):
        deferred.run()
    assert condition.would_wait == [True]


def test_a_frame_that_is_released_below_the_limit_wakes_the_stores_that_wait(engine: Engine) -> None:
    """Frames above the limit cannot be used again before their memory is released."""
    tmem = engine.tmem
    waiting_store(engine)
    tmem.limit_pool(tmem.arena.held * SEGMENT_BYTES - SEGMENT_BYTES)
    for _ in range(2):
        plan = tmem.plan_write_back()
        assert plan is not None
        tmem.commit_write_back(plan)
    assert not tmem.arena.has_free_frame
    release, signals = tmem.reclaim.plan_release(), engine.free_frames._generation
    assert release is not None
    tmem.reclaim.commit_release(release)
    assert tmem.arena.has_free_frame
    assert engine.free_frames._generation > signals


def test_a_limit_that_is_raised_wakes_the_stores_that_wait(engine: Engine) -> None:
    waiting_store(engine)
    assert not engine.tmem.arena.has_free_frame
    signals = engine.free_frames._generation
    engine.tmem.limit_pool((LIMIT + 2) * SEGMENT_BYTES)
    assert engine.tmem.arena.has_free_frame
    assert engine.free_frames._generation > signals


@pytest.fixture
def rested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sealed segment is old enough to be written ahead."""
    monkeypatch.setattr("tmemfs.policy.clean_share.AgeClock.youngest", 1 << 40)


@pytest.fixture
async def write_ahead(rested: None, engine: Engine, background: None, nursery: trio.Nursery) -> None:
    nursery.start_soon(engine.write_ahead.run)


async def test_a_share_of_the_pool_is_written_ahead_and_leaves_without_a_write(
    engine: Engine, tier: FaultyTier, write_ahead: None
) -> None:
    engine.pool_size.set_max(2 * LIMIT * SEGMENT_BYTES)
    engine.write_ahead.set_percent(50)
    await store(engine, 0, 8 * PAGES_A_SEGMENT)
    await until(lambda: len(engine.tmem.clean) >= 4)
    assert statistics(engine.tmem).pages_on_disk == 0
    tier.fail("write")
    answer = await engine.shrinker.shrink(ShrinkRequest(4 * SEGMENT_BYTES))
    assert (answer.reason, answer.written) == (None, 0) and engine.tmem.clean.dropped >= 4
    assert len(engine.tmem.clean) <= len(engine.tmem.arena.used) // 2
    tier.fail()
    await verify(engine, 8 * PAGES_A_SEGMENT)


async def test_stores_take_the_frames_of_clean_copies_where_the_tier_takes_no_more(
    engine: Engine, tier: FaultyTier, write_ahead: None
) -> None:
    engine.write_ahead.set_percent(90)
    await store(engine, 0, 8 * PAGES_A_SEGMENT)
    await until(lambda: len(engine.tmem.clean) >= 4)
    tier.fail("write")
    clean = len(engine.tmem.clean)
    with pytest.raises(NoSpace):
        await store(engine, 4096, 4000)
    assert engine.tmem.clean.dropped >= clean and not len(engine.tmem.clean)
    tier.fail()
    await verify(engine, 8 * PAGES_A_SEGMENT)


async def test_a_write_ahead_that_fails_leaves_its_segment_and_is_tried_again(
    engine: Engine, tier: FaultyTier, write_ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tmemfs.jobs.write_ahead._FAILED_S", 0.01)
    failed = list[None]()

    def fail() -> None:
        failed.append(None)
        raise TierError("injected: the tier failed")

    tier.before["write"] = fail
    await store(engine, 0, 6 * PAGES_A_SEGMENT)
    await until(lambda: len(failed) >= 3)
    assert not len(engine.tmem.clean)
    tier.fail()
    await until(lambda: len(engine.tmem.clean) > 0)
    await verify(engine, 6 * PAGES_A_SEGMENT)


async def test_what_was_stored_a_moment_ago_is_not_written_ahead(engine: Engine, tier: FaultyTier, nursery: trio.Nursery) -> None:
    nursery.start_soon(engine.write_ahead.run)
    await store(engine, 0, 6 * PAGES_A_SEGMENT)
    engine.notices.write_ahead.set()
    await trio.testing.wait_all_tasks_blocked()
    assert not len(engine.tmem.clean) and not engine.shrinker.counts.segments
