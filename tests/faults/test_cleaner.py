"""The cleaner while its tier fails, is full, or its records die under it: nothing is lost, and it goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from random import Random

import pytest
import trio

from tests.parts import FaultyTier, Regions, page_of, run_jobs
from tests.waiting import HANG_S
from tmemfs.engine import Engine
from tmemfs.errors import BackingFull, BadValue, TierError
from tmemfs.jobs.compact_request import CompactRequest
from tmemfs.jobs.shrink_request import ShrinkRequest
from tmemfs.pages.pager import Deferred
from tmemfs.policy.budget import Budget
from tmemfs.store.codec import parse_codec
from tmemfs.store.consistency import check
from tmemfs.store.dictionary import Encoder
from tmemfs.store.recompression import Recompression
from tmemfs.store.record import handle_offset, handle_segment
from tmemfs.store.statistics import segment_lines
from tmemfs.units import BLOCK_BYTES, PAGE_BYTES, SEGMENT_BYTES

SLOTS = 8192
ALL = ShrinkRequest.parse("all")
#: Raw pages that fill one segment.
FULL = 255


class Place:
    """An engine on a tier of `extents`, and a dict that says what its pages are."""

    def __init__(self, extents: int = 32) -> None:
        self.tier = FaultyTier()
        make_tmem = partial(Regions.new(SLOTS, 32, extents).start, 16, SLOTS, spare=1, reserve_bytes=2 * SEGMENT_BYTES)
        self.engine = Engine.over(make_tmem, self.tier, parse_codec("lz4"))
        self.tmem = self.engine.tmem
        self.pages: dict[int, bytes] = {}

    def fill_reserve(self) -> None:
        """What the background does; otherwise the first frames that are freed would fill it."""
        while plan := self.tmem.reclaim.plan_populate():
            self.tmem.reclaim.commit_populate(plan)

    def store(self, first: int, count: int, seed: int = 0) -> None:
        """Store raw pages; what has to wait waits."""
        for slot in range(first, first + count):
            page = page_of("raw", seed + slot)
            rest = self.engine.pager.write(slot * PAGE_BYTES, memoryview(page))
            assert rest is None
            self.pages[slot] = page

    def forget(self, *slots: int) -> None:
        for slot in slots:
            self.tmem.invalidate(slot, 1)
            self.pages.pop(slot, None)

    async def on_tier(self, segments: int, live_of_8: int = 8) -> None:
        """Store `segments` full ones, write them back, and let `live_of_8` of every eight pages live."""
        self.store(0, segments * FULL)
        assert (await self.engine.shrinker.shrink(ALL)).reason is None
        self.forget(*(slot for slot in range(segments * FULL) if slot % 8 >= live_of_8))

    async def verify(self) -> None:
        for slot, page in self.pages.items():
            found = self.engine.pager.read(slot * PAGE_BYTES, PAGE_BYTES)
            loaded = await trio.to_thread.run_sync(found.run) if isinstance(found, Deferred) else found
            assert loaded == page, slot
        check(self.tmem)

    @property
    def amplification(self) -> float:
        return self.tmem.merges.space().amplification


async def test_compact_reaches_its_factor_and_answers() -> None:
    place = Place()
    await place.on_tier(6, live_of_8=4)
    assert place.amplification > 1.9
    answer = await place.engine.cleaner.compact(CompactRequest(1.10))
    assert answer.reason is None and answer.after == place.amplification <= 1.10 and answer.before > 1.9
    assert answer.segments >= 6 and 3 * SEGMENT_BYTES * 0.9 < answer.written <= 4 * SEGMENT_BYTES
    assert {line.lane for line in segment_lines(place.tmem)} == {"cold"}
    await place.verify()


async def test_compact_that_falls_short_says_why() -> None:
    place = Place()
    await place.on_tier(2)
    answer = await place.engine.cleaner.compact(CompactRequest(1.0001))
    assert answer.reason == "nothing more can be gained" and answer.written == 0
    await place.verify()


async def test_compact_merges_in_ram_too() -> None:
    place = Place()
    place.store(0, 6 * FULL)
    place.forget(*(slot for slot in range(6 * FULL) if slot % 8 >= 3))
    frames = len(place.tmem.arena.used)
    answer = await place.engine.cleaner.compact(CompactRequest(1.10))
    assert answer.frames == frames - len(place.tmem.arena.used) >= 2
    await place.verify()


async def test_what_a_shrink_writes_is_dense_and_in_order_of_age() -> None:
    place = Place()
    place.store(0, 8 * FULL)
    place.forget(*(slot for slot in range(8 * FULL) if slot % 8 >= 5))
    live = place.tmem.ledger.totals().live_bytes
    answer = await place.engine.shrinker.shrink(ALL)
    assert answer.reason is None and answer.written * 0.95 <= live
    await place.verify()
    slots_by_age = [slot for line in segment_lines(place.tmem) for slot in _slots_of(place, line.segment)]
    assert slots_by_age == sorted(slots_by_age)


async def test_a_segment_nearly_full_is_written_as_it_is() -> None:
    place = Place()
    place.store(0, 3 * FULL)
    place.forget(0, 300)
    await place.engine.shrinker.shrink(ALL)
    assert place.tmem.merges.counts.compacted_records == 0
    await place.verify()


async def test_a_segment_that_cannot_be_read_is_left_and_the_others_are_cleaned() -> None:
    place = Place()
    await place.on_tier(4, live_of_8=3)
    calls = iter([_fail, _nothing, _nothing, _nothing])
    place.tier.before["read"] = lambda: next(calls, _nothing)()
    answer = await place.engine.cleaner.compact(CompactRequest(1.10))
    assert answer.reason == "nothing more can be gained" and place.engine.cleaner.counts.failures == 1
    assert answer.after < answer.before
    place.tier.fail()
    await place.verify()


@pytest.mark.parametrize("tears", [False, True])
async def test_a_cleaning_that_cannot_be_written_changes_nothing(tears: bool) -> None:
    place = Place()
    await place.on_tier(4, live_of_8=3)
    before = [(line.segment, line.state, line.live_bytes) for line in segment_lines(place.tmem)]
    place.tier.fail("write")
    place.tier.tears = tears
    answer = await place.engine.cleaner.compact(CompactRequest(1.10))
    assert answer.reason == "injected: the tier failed"
    assert [(line.segment, line.state, line.live_bytes) for line in segment_lines(place.tmem)] == before
    place.tier.fail()
    place.tier.tears = False
    await place.verify()
    assert (await place.engine.cleaner.compact(CompactRequest(1.10))).reason is None
    await place.verify()


async def test_a_tier_that_is_full_in_the_middle_of_cleaning_loses_nothing() -> None:
    place = Place()
    await place.on_tier(4, live_of_8=3)

    def full() -> None:
        raise BackingFull("injected: full")

    place.tier.before["write"] = full
    assert (await place.engine.cleaner.compact(CompactRequest(1.10))).reason == "injected: full"
    await place.verify()


async def test_a_damaged_record_stays_where_it_is_and_is_cleaned_around() -> None:
    place = Place()
    await place.on_tier(2, live_of_8=3)
    extent, data = next((extent, bytearray(data)) for extent, data in place.tier.inner.extents.items())
    data[100] ^= 0xFF
    place.tier.inner.extents[extent] = bytes(data)
    await place.engine.cleaner.compact(CompactRequest(1.10))
    assert place.tmem.merges.counts.damaged_records == 1
    [damaged] = [line for line in segment_lines(place.tmem) if line.lane != "cold"]
    assert damaged.pages == 1
    [slot] = _slots_of(place, damaged.segment)
    rest = place.engine.pager.read(slot * PAGE_BYTES, PAGE_BYTES)
    assert isinstance(rest, Deferred)
    with pytest.raises(TierError):
        rest.run()
    del place.pages[slot]
    await place.verify()
    assert (await place.engine.cleaner.compact(CompactRequest(1.05))).segments == 0


async def test_a_record_damaged_in_ram_does_not_hold_a_shrink_up() -> None:
    place = Place()
    place.store(0, 2 * FULL)
    place.forget(*(slot for slot in range(2 * FULL) if slot % 8 >= 3))
    handle = place.tmem.slots.handles[0]
    at = place.tmem.segments.base[handle_segment(handle)] + handle_offset(handle) + 500
    place.tmem.arena.view[at] ^= 0xFF
    with trio.fail_after(HANG_S):
        await place.engine.shrinker.shrink(ShrinkRequest(4 * SEGMENT_BYTES, deadline_s=HANG_S / 2))
    assert place.tmem.merges.counts.damaged_records == 1
    del place.pages[0]
    await place.verify()


@pytest.mark.parametrize("operation", ["read", "write"])
async def test_pages_that_die_or_change_while_they_are_cleaned_stay_so(operation: str) -> None:
    place = Place()
    await place.on_tier(4, live_of_8=3)

    def change() -> None:
        place.tier.fail()
        place.forget(0, 1, 256, 257)
        place.store(8, 2, seed=9000)

    place.tier.before[operation] = change  # type: ignore[index]
    assert (await place.engine.cleaner.compact(CompactRequest(1.10))).segments > 0
    assert place.engine.pager.read(0, PAGE_BYTES) == bytes(PAGE_BYTES)
    await place.verify()


async def test_all_pages_of_a_cleaning_may_die_meanwhile() -> None:
    place = Place()
    await place.on_tier(4, live_of_8=3)
    place.tier.before["write"] = lambda: place.forget(*list(place.pages))
    await place.engine.cleaner.compact(CompactRequest(1.10))
    place.tier.fail()
    assert not segment_lines(place.tmem)
    check(place.tmem)


async def test_pages_that_die_while_their_segment_is_written_back_stay_dead() -> None:
    place = Place()
    place.store(0, 2 * FULL)
    place.tier.before["write"] = lambda: place.forget(0, 1, 2, 300)
    await place.engine.shrinker.shrink(ALL)
    place.tier.fail()
    await place.verify()


async def test_an_extent_that_is_read_is_kept_until_it_was() -> None:
    place = Place()
    await place.on_tier(4, live_of_8=3)
    expected = place.pages[1]
    rest = place.engine.pager.read(PAGE_BYTES, PAGE_BYTES)
    assert isinstance(rest, Deferred)
    await place.engine.cleaner.compact(CompactRequest(1.10))
    place.forget(1)
    assert rest.run() == expected
    await place.verify()


async def test_a_full_backing_is_cleaned_and_stores_go_on() -> None:
    place = Place(extents=8)
    await place.on_tier(6, live_of_8=3)
    place.store(4000, 6 * FULL)
    place.fill_reserve()
    live = place.tmem.ledger.totals().live_bytes
    answer = await place.engine.shrinker.shrink(ShrinkRequest(2 * SEGMENT_BYTES))
    assert answer.reason is None and answer.freed >= 2 * SEGMENT_BYTES
    assert place.tmem.merges.counts.cleanings >= 1 and place.tmem.ledger.totals().live_bytes == live
    assert place.tmem.extents.held_bytes <= 8 * SEGMENT_BYTES
    await place.verify()


async def test_a_full_backing_without_a_dead_page_is_still_full() -> None:
    place = Place(extents=6)
    place.store(0, 8 * FULL)
    answer = await place.engine.shrinker.shrink(ALL)
    assert answer.reason is not None and answer.reason.startswith("the backing is full")
    assert place.tmem.extents.held_bytes <= 4 * SEGMENT_BYTES
    await place.verify()


async def test_a_budget_that_is_used_up_leaves_the_backing_full() -> None:
    place = Place(extents=8)
    await place.on_tier(6, live_of_8=4)
    place.engine.cleaner.set_budget(daily=0)
    place.store(4000, 6 * FULL)
    answer = await place.engine.shrinker.shrink(ALL)
    assert answer.reason is not None and "the backing is full" in answer.reason
    assert place.tmem.merges.counts.cleanings == 0
    await place.verify()


async def test_the_cleaner_waits_while_faults_do(nursery: trio.Nursery) -> None:
    place = Place()
    await place.on_tier(4, live_of_8=3)
    place.engine.reader.waiting = 1
    await place.engine.cleaner.compact(CompactRequest(1.10))
    assert place.engine.cleaner.counts.pauses >= 1 and place.engine.cleaner.counts.paused_s >= 0.09
    await place.verify()


async def test_the_background_cleans_what_has_died(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmemfs.policy.cleaning.DEAD_BYTES", SEGMENT_BYTES)
    place = Place()
    await place.on_tier(6, live_of_8=3)
    nursery.start_soon(run_jobs, place.engine)
    await _until(lambda: place.amplification < 1.3)
    await place.verify()
    nursery.cancel_scope.cancel()


async def test_the_background_compacts_ram_when_pages_only_die(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmemfs.policy.cleaning.DEAD_BYTES", SEGMENT_BYTES)
    place = Place()
    nursery.start_soon(run_jobs, place.engine)
    place.store(0, 8 * FULL)
    await _until(lambda: len(place.tmem.arena.used) == 8)
    place.forget(*(slot for slot in range(8 * FULL) if slot % 8 >= 2))
    await _until(lambda: len(place.tmem.arena.used) <= 4)  # no two of them fit into one any more
    assert place.tmem.merges.counts.compactions and not place.tier.inner.extents
    await place.verify()
    nursery.cancel_scope.cancel()


async def test_the_background_keeps_within_its_rate(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmemfs.policy.cleaning.DEAD_BYTES", SEGMENT_BYTES)
    place = Place()
    await place.on_tier(9, live_of_8=3)
    place.engine.cleaner.set_budget(rate=1000)
    nursery.start_soon(run_jobs, place.engine)
    await _until(lambda: place.tmem.merges.counts.cleanings)
    await trio.sleep(0.2)
    assert place.tmem.merges.counts.cleanings == 1
    nursery.cancel_scope.cancel()


def test_a_budget_lets_a_day_go_by() -> None:
    budget = Budget(rate=100.0, daily=1000.0)
    assert budget.wait_s(0.0) == 0
    budget.spend(300, 10.0)
    assert budget.wait_s(10.0) == pytest.approx(2.0) and budget.left_today(10.0) == 700
    budget.spend(700, 20.0)
    assert budget.wait_s(30.0) == pytest.approx(86370.0)
    assert budget.left_today(86400.0) == 1000 and budget.wait_s(86400.0) == 0


@pytest.mark.parametrize("text", ["1", "0.9", "-2", "much", "nan", "inf", "1e9"])
def test_an_amplification_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadValue, match=r"is not an amplification: give a number above 1, for example 1\.10"):
        CompactRequest.parse(text)


def test_no_amplification_means_the_default() -> None:
    assert (CompactRequest.parse("").factor, CompactRequest.parse(" 1.5\n").factor) == (1.10, 1.5)


def test_a_compaction_may_have_a_deadline() -> None:
    assert CompactRequest.parse("1.05 deadline=500ms\n") == CompactRequest(1.05, 0.5)
    assert CompactRequest.parse("deadline=2s") == CompactRequest(1.10, 2.0)
    for text in ("1.05 now", "1.05 deadline=soon", "1.05 before=2s"):
        with pytest.raises(BadValue):
            CompactRequest.parse(text)


def _slots_of(place: Place, segment: int) -> list[int]:
    handles = place.tmem.slots.handles
    return sorted(slot for slot in range(SLOTS) if handles[slot] > 1 and handle_segment(handles[slot]) == segment)


def _fail() -> None:
    raise TierError("injected: the tier failed")


def _nothing() -> None:
    pass


async def _until(condition: Callable[[], object]) -> None:
    with trio.fail_after(HANG_S):
        while not condition():
            await trio.sleep(0.005)


async def test_what_a_merge_in_the_background_frees_meanwhile_counts(nursery: trio.Nursery) -> None:
    """It holds the last spare frame, so nothing else can be merged; a full tier waits for its end."""
    engine = Place().engine
    made: list[int | None] = []
    assert engine.full_tier.free_frame_or_extent() is None
    with engine.merger._in_ram:
        nursery.start_soon(trio.to_thread.run_sync, lambda: made.append(engine.full_tier.free_frame_or_extent()))
        await trio.sleep(0.05)
        assert not made
        engine.tmem.merges.counts.compactions += 1
    with trio.fail_after(HANG_S):
        while not made:
            await trio.sleep(0.005)
    assert made == [0]


def only_smaller(place: Place) -> Callable[[], None]:
    """To be called before each write of a cleaning: the one before has made smaller what segments take of the tier."""
    occupied: list[int] = []

    def note() -> None:
        now = place.tmem.merges.space().occupied - SEGMENT_BYTES  # the extent that is written is counted whole
        assert not occupied or now < occupied[-1], "a cleaning that gained nothing"
        occupied.append(now)

    return note


async def test_a_cleaning_whose_gaps_take_what_it_would_gain_is_not_written() -> None:
    """100 records of 20 bytes, 200 of 4108, one of which would touch three blocks and leaves a gap of 8 bytes, and 804 of 20.

    Without the gap they take 205 blocks, with it 206, and as three segments 206 too.
    """
    place = Place()
    place.engine.pager.set_codec(parse_codec("none"))
    first = 0
    for kind, count in (("fill", 100), ("raw", 200), ("fill", 804)):
        for slot in range(first, first + count):
            place.pages[slot] = page_of(kind, slot)  # type: ignore[arg-type]
            place.engine.pager.write(slot * PAGE_BYTES, memoryview(place.pages[slot]))
        assert (await place.engine.shrinker.shrink(ALL)).reason is None
        first += count
    assert place.tmem.merges.space().occupied == 206 * BLOCK_BYTES and place.tmem.ledger.totals().live_bytes == 205 * BLOCK_BYTES
    place.tier.before["write"] = only_smaller(place)
    answer = await place.engine.cleaner.compact(CompactRequest(1.0001))
    assert (answer.written, answer.reason) == (0, "nothing more can be gained")
    assert not place.tmem.merges.plan_clean(BLOCK_BYTES)
    place.forget(*range(100, 110))
    answer = await place.engine.cleaner.compact(CompactRequest(1.0001))
    assert answer.written and place.tmem.merges.space().occupied <= 197 * BLOCK_BYTES
    await place.verify()


@pytest.mark.parametrize("every", [2, 17, 255])
async def test_a_compaction_ends_whatever_sizes_its_records_have(every: int) -> None:
    place, random = Place(), Random(every)
    for slot in range(6 * FULL):
        size = random.choice((PAGE_BYTES, 3880, 3700, 8))
        place.pages[slot] = random.randbytes(size).ljust(PAGE_BYTES, b"\0")
        place.engine.pager.write(slot * PAGE_BYTES, memoryview(place.pages[slot]))
    assert (await place.engine.shrinker.shrink(ALL)).reason is None
    place.forget(*range(0, 6 * FULL, every))
    place.tier.before["write"] = only_smaller(place)
    answer = await place.engine.cleaner.compact(CompactRequest(1.0001))
    again = await place.engine.cleaner.compact(CompactRequest(1.0001))
    assert answer.reason == again.reason == "nothing more can be gained" and not again.written
    place.tier.fail()
    await place.verify()


async def test_a_segment_that_gains_nothing_is_tried_again_when_more_of_it_has_died() -> None:
    place = Place()
    await place.on_tier(1)
    place.forget(3)
    while (await place.engine.cleaner.compact(CompactRequest(1.0001))).written:
        pass
    place.forget(*range(100))
    assert (await place.engine.cleaner.compact(CompactRequest(1.0001))).written
    await place.verify()


async def test_the_background_comes_to_rest(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more is dead than it may be by its thresholds, but nothing can be gained."""
    monkeypatch.setattr("tmemfs.policy.cleaning.DEAD_BYTES", 0)
    monkeypatch.setattr("tmemfs.policy.cleaning.STOP_AMPLIFICATION", 1.0)
    monkeypatch.setattr("tmemfs.policy.cleaning.START_AMPLIFICATION", 1.0)
    place = Place()
    place.store(0, 8 * FULL)
    place.forget(*range(0, 8 * FULL, 17))
    nursery.start_soon(run_jobs, place.engine)
    await place.engine.shrinker.shrink(ALL)
    counts = place.tmem.merges.counts
    seen = -1
    with trio.fail_after(HANG_S):
        while counts.cleanings + counts.compactions != seen:
            seen = counts.cleanings + counts.compactions
            await trio.sleep(0.3)
    nursery.cancel_scope.cancel()


async def test_a_small_segment_with_a_dictionary_is_written_as_it_is() -> None:
    """Its dictionary makes it look sparse, and comes along wherever it is merged to."""
    place = Place()
    recompression = Recompression(place.tmem)
    for slot in range(40):
        place.engine.pager.write(slot * PAGE_BYTES, memoryview(page_of("half", slot)))
        place.pages[slot] = page_of("half", slot)
    plan = place.tmem.plan_write_back(include_open=True)
    assert plan is not None
    place.tmem.abort_write_back(plan)
    recompression.look(None)
    encoder = Encoder(place.tmem.dictionaries.add(bytes(range(256)) * 16), 1)
    merge = recompression.plan(recompression.look(encoder), encoder)
    assert merge is not None
    place.tmem.merges.commit(merge, place.tmem.merges.copy_in_ram(merge))
    place.forget(*range(20))
    with trio.fail_after(HANG_S):
        assert (await place.engine.shrinker.shrink(ShrinkRequest(64 * SEGMENT_BYTES, deadline_s=5))).written
    await place.verify()


@pytest.mark.parametrize("operation", ["read", "write"])
async def test_a_compaction_that_is_interrupted_changes_nothing_more_and_says_how_far_it_came(operation: str) -> None:
    place = Place()
    await place.on_tier(8, live_of_8=4)
    token, calls = trio.lowlevel.current_trio_token(), iter(range(100))
    with trio.CancelScope() as scope:

        def interrupt() -> None:
            if next(calls) == (2 if operation == "write" else 5):
                trio.from_thread.run_sync(scope.cancel, trio_token=token)
                trio.from_thread.run_sync(lambda: None, trio_token=token)

        place.tier.before[operation] = interrupt  # type: ignore[index]
        await place.engine.cleaner.compact(CompactRequest(1.0001))
    assert scope.cancelled_caught
    last = place.engine.cleaner.last
    assert last is not None and last.reason == "interrupted" and last.after == place.amplification < last.before
    assert last.segments and not place.tmem.segments.pins
    place.tier.fail()
    await place.verify()
    assert (await place.engine.cleaner.compact(CompactRequest(1.10))).reason is None


async def test_a_compaction_ends_at_its_deadline() -> None:
    place = Place()
    await place.on_tier(8, live_of_8=4)
    answer = await place.engine.cleaner.compact(CompactRequest(1.0001, deadline_s=0.0))
    assert (answer.reason, answer.written, answer.after) == ("the deadline passed", 0, answer.before)
    await place.verify()


async def test_a_compaction_that_waits_for_another_one_can_be_interrupted() -> None:
    place = Place()
    await place.on_tier(8, live_of_8=4)
    with place.engine.merger._one_at_a_time, trio.move_on_after(0.05) as scope:
        await place.engine.cleaner.compact(CompactRequest(1.0001))
    assert scope.cancelled_caught and place.engine.cleaner.last is not None
    assert place.engine.cleaner.last.reason == "interrupted"


async def test_a_compaction_that_waits_for_one_on_request_can_be_interrupted() -> None:
    place = Place()
    await place.on_tier(8, live_of_8=4)
    reading, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        reading.set()
        assert go_on.wait(HANG_S)

    place.tier.before["read"] = hold
    async with trio.open_nursery() as nursery:
        nursery.start_soon(place.engine.cleaner.compact, CompactRequest(1.1))
        await _until(reading.is_set)
        with trio.move_on_after(0.05) as scope:
            await place.engine.cleaner.compact(CompactRequest(1.0001))
        assert scope.cancelled_caught
        go_on.set()
    assert place.engine.cleaner.last is not None and place.engine.cleaner.last.reason is None


async def test_a_compaction_is_not_held_up_by_holes_that_are_still_to_be_punched() -> None:
    """Two cleanings leave no extent for a third one while what they have emptied counts."""
    place = Place(extents=8)
    await place.on_tier(6, live_of_8=3)
    answer = await place.engine.cleaner.compact(CompactRequest(1.10))
    assert answer.reason is None and answer.segments == 6
    await place.verify()
