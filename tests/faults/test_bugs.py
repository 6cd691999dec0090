"""Exceptions that no code expects, as a bug or a lack of memory raises them: no plan is left open, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import trio

from tests.parts import FaultyTier, new_limits, new_pressure, new_tmem, page_of
from tmemfs.engine import Engine
from tmemfs.errors import NoSpace
from tmemfs.jobs import reserve as reserve_module
from tmemfs.jobs import shrinker as shrinker_module
from tmemfs.jobs.compact_request import CompactRequest
from tmemfs.jobs.shrink_request import ShrinkRequest
from tmemfs.jobs.supervision import Jobs, first_error
from tmemfs.pages.pager import Deferred
from tmemfs.services import Services
from tmemfs.store.codec import parse_codec
from tmemfs.store.consistency import check
from tmemfs.store.merge_copy import RecordCopier
from tmemfs.tiers.in_memory import MemoryTier
from tmemfs.tiers.tier import Tier
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES

ALL = ShrinkRequest.parse("all")
LIMIT = 14
#: Raw pages that fill one segment.
FULL = 255


class Injected(Exception):
    """Not one of tmemfs's own errors."""


def fail(*_: Any, **__: Any) -> Any:
    """Raise what nobody expects."""
    raise Injected("injected")


def new_services(tier: Tier) -> Services:
    """Services over `tier`, of which nothing runs."""
    engine = Engine.over(partial(new_tmem, slots=8192, frames=32, limit=LIMIT, extents=32), tier, parse_codec("lz4"))
    return Services(engine, new_limits(engine, 32 * SEGMENT_BYTES, 32 * SEGMENT_BYTES), new_pressure(engine), Jobs())


@pytest.fixture
def tier() -> FaultyTier:
    return FaultyTier()


@pytest.fixture
def services(tier: FaultyTier) -> Services:
    return new_services(tier)


def store(services: Services, first: int, count: int) -> None:
    """Store raw pages where there are free frames."""
    for slot in range(first, first + count):
        assert services.engine.pager.write(slot * PAGE_BYTES, memoryview(page_of("raw", slot))) is None


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.005)


async def expect_failure(run: Callable[[], Awaitable[object]]) -> None:
    """`run` raises what was injected, as a supervisor gets it."""
    with pytest.raises((Injected, ExceptionGroup)) as caught:
        await run()
    assert isinstance(first_error(caught.value), Injected)


@pytest.mark.parametrize("capacity", [0, 1 << 30])
async def test_a_shrinker_that_failed_once_is_healthy_again(nursery: trio.Nursery, capacity: int) -> None:
    """Also without a backing: nothing can be written there, but nothing has to be."""
    services = new_services(MemoryTier(capacity))
    shrinker, free_frames = services.engine.shrinker, services.engine.free_frames
    store(services, 0, 3 * FULL)
    shrinker.failed("job shrinker failed: injected")
    assert services.state() == "degraded: job shrinker failed: injected"
    nursery.start_soon(shrinker.run)
    await until(lambda: free_frames.stuck is None)
    await trio.sleep(3 * shrinker_module.RETRY_S)
    assert services.state() == "running"
    nursery.cancel_scope.cancel()


async def test_no_store_waits_for_a_shrinker_that_has_ended(services: Services) -> None:
    """The event loop failed, or ends: nobody frees frames any more, and what waits for that store waits with it."""
    slot = 0
    while (rest := services.engine.pager.write(slot * PAGE_BYTES, memoryview(page_of("raw", slot)))) is None:
        slot += 1
    assert isinstance(rest, Deferred)
    with trio.fail_after(10):  # it may be stored still: the shrinker has run for a moment
        async with trio.open_nursery() as waiting:
            waiting.start_soon(finish_or_refuse, rest)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(services.engine.shrinker.run)
                await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
    with pytest.raises(NoSpace, match="not running"):
        for slot in range(4096):
            assert services.engine.pager.write(slot * PAGE_BYTES, memoryview(page_of("raw", slot))) is None


async def finish_or_refuse(rest: Deferred) -> None:
    with suppress(NoSpace):
        await trio.to_thread.run_sync(rest.run)


async def test_frames_that_an_error_interrupted_are_released_later(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    store(services, 0, 8 * FULL)
    with monkeypatch.context() as patch:
        patch.setattr(shrinker_module, "punch", fail)
        await expect_failure(partial(services.engine.shrinker.shrink, ALL))
    await services.engine.shrinker.shrink(ALL)
    assert services.engine.tmem.pool_bytes <= services.engine.tmem.arena.reserve * SEGMENT_BYTES
    check(services.engine.tmem)


async def test_a_frame_that_an_error_kept_from_being_faulted_in_is_tried_again(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(reserve_module, "populate", fail)
        await expect_failure(services.engine.shrinker.run)
    assert services.engine.tmem.arena.held == 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(services.engine.shrinker.run)
        await until(lambda: services.engine.tmem.arena.held == services.engine.tmem.arena.reserve)
        nursery.cancel_scope.cancel()


async def test_extents_that_an_error_kept_from_being_punched_are_punched_later(services: Services, tier: FaultyTier) -> None:
    store(services, 0, 4 * FULL)
    await services.engine.shrinker.shrink(ALL)
    services.engine.tmem.invalidate(0, 4 * FULL)
    tier.before["discard"] = fail
    await expect_failure(partial(services.engine.shrinker.shrink, ALL))
    tier.fail()
    await services.engine.shrinker.shrink(ALL)
    assert not tier.inner.extents and services.engine.tmem.extents.held_bytes == 0


async def test_a_merge_in_ram_that_an_error_interrupted_is_undone(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    tmem = services.engine.tmem
    store(services, 0, 4 * FULL)
    for slot in range(4 * FULL):
        if slot % 8:
            tmem.invalidate(slot, 1)
    held = len(tmem.arena.used)
    with monkeypatch.context() as patch:
        patch.setattr(RecordCopier, "copy", fail)
        await expect_failure(partial(services.engine.cleaner.compact, CompactRequest(1.1)))
    assert len(tmem.arena.used) == held
    answer = await services.engine.cleaner.compact(CompactRequest(1.1))
    assert answer.frames >= 2
    assert all(tmem.load(slot) == page_of("raw", slot) for slot in range(0, 4 * FULL, 8))
    check(tmem)


async def test_a_limit_that_an_error_kept_from_being_reached_stays(services: Services, tier: FaultyTier) -> None:
    store(services, 0, 12 * FULL)
    tier.before["write"] = fail
    await expect_failure(partial(services.limits.set_pool_max, "10M"))
    assert services.limits.pool.max == LIMIT * SEGMENT_BYTES and services.engine.tmem.arena.limit == LIMIT


async def test_a_limit_that_a_cancelled_write_did_not_reach_stays(services: Services, tier: FaultyTier) -> None:
    store(services, 0, 12 * FULL)
    token = trio.lowlevel.current_trio_token()
    with trio.CancelScope() as scope:
        tier.before["write"] = partial(token.run_sync_soon, scope.cancel)
        await services.limits.set_pool_max("10M")
    assert scope.cancelled_caught
    assert services.limits.pool.max == LIMIT * SEGMENT_BYTES and services.engine.tmem.arena.limit == LIMIT


async def test_a_store_that_an_error_ended_forgets_the_old_page(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    tmem, slot = services.engine.tmem, 0
    while (rest := services.engine.pager.write(slot * PAGE_BYTES, memoryview(page_of("raw", slot)))) is None:
        slot += 1
    assert isinstance(rest, Deferred)
    again = services.engine.pager.write(0, memoryview(page_of("raw", 7)))
    assert isinstance(again, Deferred) and tmem.load(0) == page_of("raw", 0)
    monkeypatch.setattr(services.engine.pager, "_apply", fail)
    with pytest.raises(Injected):
        again.run()
    assert tmem.load(0) == bytes(PAGE_BYTES)
