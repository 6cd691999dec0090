"""The pool's limit while it is lowered, while memory is short, and both at once: never more is held."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from random import Random

import pytest
import trio

from tests.parts import FaultyTier, FixedSignals, new_limits, new_pressure, new_tmem, page_of, run_jobs
from tests.waiting import HANG_S
from tmemfs.engine import Engine
from tmemfs.errors import Busy
from tmemfs.jobs.pool_size import PoolSize
from tmemfs.jobs.reserve import FRAME_S, SHORT_FRAME_S
from tmemfs.jobs.shrink_request import ShrinkRequest
from tmemfs.pages.pager import Deferred
from tmemfs.policy.pressure_controller import HOLDING, Settings
from tmemfs.store.codec import parse_codec
from tmemfs.store.consistency import check
from tmemfs.store.extents import CLEANING_RESERVE_BYTES, Extents
from tmemfs.store.frames import KEPT_FRAMES, SPARE_FRAMES, Arena
from tmemfs.store.segments import SegmentTable
from tmemfs.store.slots import SlotTable
from tmemfs.store.tmem import Tmem
from tmemfs.units import MIB, PAGE_BYTES, SEGMENT_BYTES

SLOTS = 16384


class Place:
    """An engine with frames as a daemon has them, on a machine whose memory is what the test says."""

    def __init__(self) -> None:
        arena = Arena(80, 60, spare=SPARE_FRAMES, kept=KEPT_FRAMES)
        self.tier = FaultyTier()
        make_tmem = partial(Tmem, SlotTable(SLOTS), SegmentTable(280), arena, Extents(200, None, CLEANING_RESERVE_BYTES))
        self.engine = Engine.over(make_tmem, self.tier, parse_codec("lz4"))
        self.tmem = self.engine.tmem
        self.limits = new_limits(self.engine, 80 * MIB, 200 * MIB)
        self.signals = FixedSignals(headroom_bytes=1000 * MIB, memory_bytes=160 * MIB)
        self.pressure = new_pressure(self.engine, self.signals)
        self.pressure.settings = Settings(10 * MIB, 1000 * MIB)

    async def store(self, slot: int) -> None:
        """Sixteen raw pages; what has to wait waits."""
        data = b"".join(page_of("raw", number) for number in range(16))
        result = self.engine.pager.write(slot * PAGE_BYTES, memoryview(data))
        if isinstance(result, Deferred):
            await trio.to_thread.run_sync(result.run)

    async def churn(self) -> None:
        """Pages come and die, so that segments become sparse and are merged."""
        random = Random(1)
        while True:
            await self.store(random.randrange(SLOTS // 16) * 16)
            self.tmem.invalidate(random.randrange(SLOTS - 64), 48)
            await trio.sleep(0)

    async def press(self) -> None:
        """Memory is short, and is not, again and again."""
        for headroom in itertools.cycle((1000, 15, 5, 1, 15)):
            self.signals.headroom_bytes = headroom * MIB
            self.pressure.sample_again()
            await trio.sleep(0.015)


@pytest.mark.parametrize("mib", [10, 11, 20])
async def test_a_limit_is_not_exceeded_while_memory_is_short(
    mib: int, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merges take the spare frame and the reserve is being filled meanwhile; `Arena.peak` has seen each frame that was taken."""
    monkeypatch.setattr("tmemfs.policy.cleaning.DEAD_BYTES", SEGMENT_BYTES)
    place = Place()
    for task in (partial(run_jobs, place.engine), place.pressure.run, place.churn):
        nursery.start_soon(task)
    counts = place.tmem.merges.counts
    with trio.fail_after(HANG_S):
        while place.tmem.pool_bytes < 30 * MIB:
            await trio.sleep(0.01)
        # Only now: on a busy machine a pool that is pressed may never become that large.
        nursery.start_soon(place.press)
        await place.limits.set_pool_max(f"{mib}M")
        assert place.tmem.pool_bytes <= mib * MIB
        place.tmem.arena.peak = 0
        before, strict = counts.compactions, place.pressure.counts.strict
        while counts.compactions < before + 10 or place.pressure.counts.strict < strict + 5:
            await trio.sleep(0.01)
    assert 0 < place.tmem.arena.peak <= mib
    nursery.cancel_scope.cancel()
    check(place.tmem)


async def test_pressure_that_ends_does_not_undo_a_limit_that_is_being_approached() -> None:
    place = Place()
    for slot in range(0, 40 * 255, 16):
        await place.store(slot)
    seen: list[int] = []
    token = trio.lowlevel.current_trio_token()

    def sample() -> None:
        for headroom in (5, 1000):
            place.signals.headroom_bytes = headroom * MIB
            trio.from_thread.run_sync(place.pressure._take_sample, trio_token=token)
        seen.append(place.tmem.arena.limit)

    place.tier.before["write"] = sample
    await place.limits.set_pool_max("12M")
    assert seen and set(seen) == {12} and place.limits.pool.max == 12 * MIB


async def test_a_limit_that_cannot_be_reached_leaves_what_pressure_allows() -> None:
    place = Place()
    for slot in range(0, 40 * 255, 16):
        await place.store(slot)
    place.tier.fail("write")
    place.engine.pool_size.press(20 * MIB, is_short=True)
    allowed = place.tmem.arena.limit
    with pytest.raises(Busy):
        await place.limits.set_pool_max("12M")
    assert place.tmem.arena.limit == allowed < 60
    place.engine.pool_size.press(math.inf, is_short=False)
    assert place.tmem.arena.limit == 60 == place.limits.pool.max // MIB


async def test_memory_counts_as_short_where_the_controller_begins_to_act_while_it_is() -> None:
    """Then it holds without a ceiling: nothing is limited, but no store waits longer for a frame than while memory is short."""
    place = Place()
    place.signals.headroom_bytes = 15 * MIB
    place.pressure.set_mode("manual")
    place.pressure._take_sample()
    assert place.engine.reserve.frame_s == FRAME_S
    place.pressure.set_mode("auto")
    place.pressure._take_sample()
    assert (place.pressure.decision.state, place.pressure.decision.ceiling) == (HOLDING, math.inf)
    assert place.engine.reserve.frame_s == SHORT_FRAME_S and place.tmem.arena.limit == 60
    place.signals.headroom_bytes = 1000 * MIB
    place.pressure._take_sample()
    assert place.engine.reserve.frame_s == FRAME_S and place.tmem.arena.limit == 60


async def test_a_limit_whose_lowering_is_interrupted_is_what_it_was() -> None:
    place = Place()
    for slot in range(0, 40 * 255, 16):
        await place.store(slot)
    token = trio.lowlevel.current_trio_token()
    with trio.CancelScope() as scope:
        place.tier.before["write"] = partial(trio.from_thread.run_sync, scope.cancel, trio_token=token)
        await place.limits.set_pool_max("12M")
    assert scope.cancelled_caught
    assert place.tmem.arena.limit == 60 == place.limits.pool.max // MIB


@pytest.mark.parametrize("order", list(itertools.permutations(("approach", "press", "give_up"))))
def test_the_least_limit_is_in_force_whatever_comes_first(order: tuple[str, ...]) -> None:
    size = PoolSize(new_tmem(limit=16), lambda: None)
    press = partial(size.press, 14 * MIB, is_short=True)
    steps: dict[str, Callable[[], None]] = {"approach": lambda: size.approach(8 * MIB), "press": press, "give_up": size.give_up}
    approached = allowed = 16
    for step in order:
        steps[step]()
        approached = {"approach": 8, "give_up": 16}.get(step, approached)
        allowed = 14 if step == "press" else allowed
        assert size.limit_bytes == min(approached, allowed) * MIB
    size.set_max(9 * MIB)
    assert size.limit_bytes == 9 * MIB
    size.set_max(30 * MIB)
    assert size.limit_bytes == min(allowed if allowed < 16 else 30, 30) * MIB
    size.press(math.inf, is_short=False)
    assert size.limit_bytes == 30 * MIB


async def test_a_shrink_of_all_waits_for_a_merge_that_holds_segments() -> None:
    place = Place()
    for slot in range(0, 8 * 255, 16):
        await place.store(slot)
    plan = place.tmem.plan_write_back(include_open=True)
    assert plan is not None
    place.tmem.abort_write_back(plan)
    for slot in range(0, 8 * 255, 2):
        place.tmem.invalidate(slot, 1)
    merge = place.tmem.merges.plan_compact()
    assert merge is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(place.engine.shrinker.shrink, ShrinkRequest.parse("all"))
        with trio.fail_after(HANG_S):
            while place.tmem.has_victims:
                await trio.sleep(0.005)
        await trio.sleep(0.05)
        assert place.engine.shrinker.last is None
        place.engine.merger.merge_in_ram(merge)
    last = place.engine.shrinker.last
    assert last is not None and last.reason is None and not place.tmem.arena.used


async def test_a_shrink_that_waits_for_a_merge_ends_at_its_deadline_and_says_so() -> None:
    place = Place()
    for slot in range(0, 4 * 255, 16):
        await place.store(slot)
    for slot in range(0, 4 * 255, 2):
        place.tmem.invalidate(slot, 1)
    assert place.tmem.merges.plan_compact() is not None
    answer = await place.engine.shrinker.shrink(ShrinkRequest.parse("all deadline=50ms"))
    assert answer.reason == "the deadline passed"
