"""The reserve: how long the shrinker waits for a frame before it writes segments back instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import trio

from tests.parts import FaultyTier, new_tmem, page_of
from tmemfs.engine import Engine
from tmemfs.store.codec import parse_codec
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES

LIMIT = 20
WAIT_S = 0.1
PAGES_A_SEGMENT = SEGMENT_BYTES // (PAGE_BYTES + 16)


@pytest.fixture
def clock(autojump_clock: trio.testing.MockClock) -> trio.testing.MockClock:
    """A clock that goes only when everything waits for it."""
    return autojump_clock


@pytest.fixture
def engine() -> Engine:
    """One that faults no frame in; what its first segments are in was there before."""
    engine = Engine.over(partial(new_tmem, frames=32, limit=LIMIT), FaultyTier(), parse_codec("lz4"))
    store(engine, 4)
    engine.tmem.arena.allow_cold(False)
    return engine


def store(engine: Engine, segments: int) -> None:
    for slot in range(segments * PAGES_A_SEGMENT):
        assert engine.pager.write(slot * PAGE_BYTES, memoryview(page_of("raw", slot))) is None


def give_frame(engine: Engine) -> None:
    """As the thread that faults frames in; a store takes it at once."""
    plan = engine.tmem.reclaim.plan_populate()
    assert plan
    engine.tmem.reclaim.commit_populate(plan)
    engine.reserve._given += 1
    assert engine.tmem.arena.take() is not None
    engine.notices()


async def waited_s(engine: Engine, wait_s: float = WAIT_S) -> float:
    began = trio.current_time()
    assert not await engine.reserve.has_frame_soon(wait_s)
    return trio.current_time() - began


async def test_where_the_system_gives_none_only_the_first_segment_waits(engine: Engine, clock: trio.testing.MockClock) -> None:
    assert await waited_s(engine) == pytest.approx(WAIT_S)
    for _ in range(10):
        assert await waited_s(engine) == 0


async def test_a_frame_that_is_given_and_taken_is_waited_for_again(engine: Engine, clock: trio.testing.MockClock) -> None:
    with engine.notices.delivered():
        await waited_s(engine)
        give_frame(engine)
        assert await waited_s(engine) == pytest.approx(WAIT_S)
        assert await waited_s(engine) == 0


async def test_a_frame_that_is_there_begins_it_anew(engine: Engine, clock: trio.testing.MockClock) -> None:
    await waited_s(engine)
    plan = engine.tmem.reclaim.plan_populate()
    assert plan
    engine.tmem.reclaim.commit_populate(plan)
    assert await engine.reserve.has_frame_soon(WAIT_S)
    assert engine.tmem.arena.take() is not None
    assert await waited_s(engine) == pytest.approx(WAIT_S)


@pytest.mark.parametrize(("wait_s", "ends"), [(WAIT_S, True), (math.inf, False)], ids=["tier", "no tier"])
async def test_a_pool_above_its_watermark_waits_for_no_frame_if_it_can_be_written(
    engine: Engine, clock: trio.testing.MockClock, wait_s: float, ends: bool
) -> None:
    engine.pool_size.set_high(2 * SEGMENT_BYTES)
    with trio.move_on_after(60) as still_waits:
        await engine.reserve.has_frame_soon(wait_s)
    assert still_waits.cancelled_caught != ends


@pytest.mark.parametrize("why", ["full", "no cold frame"])
async def test_where_no_frame_can_come_none_is_waited_for(engine: Engine, clock: trio.testing.MockClock, why: str) -> None:
    change: Callable[[], None] = partial(engine.tmem.limit_pool, 0)
    if why == "no cold frame":
        change = partial(setattr, engine.tmem.arena, "_untouched", 32)
    change()
    assert await waited_s(engine) == 0
