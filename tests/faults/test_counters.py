"""Counters that several threads change lose nothing, however a thread is interrupted between reading one and writing it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest

from tests.parts import FaultyTier, new_tmem, page_of
from tmemfs.engine import Engine
from tmemfs.errors import NoSpace
from tmemfs.pages.pager import Deferred
from tmemfs.store.codec import parse_codec
from tmemfs.store.merge_plans import Copied
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES

THREADS = 6
TIMES = 5


class Slow(int):
    """A number that takes its time to be added to: others add meanwhile, if they may."""

    def __add__(self, other: int) -> Slow:
        time.sleep(0.0005)
        return Slow(int(self) + other)

    __iadd__ = __radd__ = __add__


def in_threads(work: Callable[[], object]) -> None:
    threads = [threading.Thread(target=lambda: [work() for _ in range(TIMES)]) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def engine_of(limit: int = 12) -> Engine:
    return Engine.over(partial(new_tmem, limit=limit), FaultyTier(), parse_codec("lz4"))


def test_stores_that_wait_are_counted_by_the_page_path_and_by_the_thread_that_ends_them() -> None:
    engine = engine_of(limit=1)
    for slot in range(256):
        engine.pager.write(slot * PAGE_BYTES, memoryview(page_of("raw", slot)))
    pager = engine.pager
    assert pager._waiting  # the last of them
    pager._waiting, pager.refused = Slow(1), Slow(0)  # so that none of them is tried at once

    def store() -> None:
        waits = pager.write(0, memoryview(page_of("raw", 1)))
        assert isinstance(waits, Deferred)
        waiting.append(waits)

    waiting = list[Deferred]()
    in_threads(store)
    assert (pager._waiting, pager.refused) == (1 + THREADS * TIMES, 0)
    engine.free_frames.set_stuck("the test says so")
    in_threads(lambda: refuse(waiting.pop()))
    assert (pager._waiting, pager.refused) == (1, THREADS * TIMES)


def refuse(waits: Deferred) -> None:
    with pytest.raises(NoSpace):
        waits.run()


def test_stores_that_are_refused_at_once_are_counted_by_any_thread() -> None:
    engine = engine_of(limit=1)
    engine.free_frames.set_stuck("the test says so")
    pager = engine.pager
    with suppress(NoSpace):
        for slot in range(512):
            pager.write(slot * PAGE_BYTES, memoryview(page_of("raw", slot)))
    pager.refused = Slow(0)

    def store() -> None:
        with pytest.raises(NoSpace):
            pager.write(0, memoryview(page_of("raw", 1)))

    in_threads(store)
    assert pager.refused == THREADS * TIMES


def test_failures_and_pauses_of_the_cleaner_are_counted_by_any_thread() -> None:
    merger = engine_of().merger
    merger.counts.failures, merger.counts.pauses = Slow(0), Slow(0)
    in_threads(merger.note_failure)
    in_threads(lambda: merger.note_pause(0.0))
    assert merger.counts.failures == merger.counts.pauses == THREADS * TIMES


def test_damaged_records_are_counted_by_any_thread_that_copies() -> None:
    engine = engine_of()
    tmem = engine.tmem
    for slot in range(600):
        engine.pager.write(slot * PAGE_BYTES, memoryview(page_of("raw", slot)))
    for slot in range(600):
        if slot % 8 > 2:
            tmem.invalidate(slot, 1)
    plan = tmem.merges.plan_compact()
    assert plan is not None
    source = plan.sources[0]
    assert source.data is not None
    source.data[100] ^= 0xFF
    tmem.merges.counts.damaged_records = Slow(0)
    in_threads(lambda: tmem.merges.copy(plan, source, source.data or memoryview(b""), Copied(memoryview(bytearray(SEGMENT_BYTES)))))
    assert tmem.merges.counts.damaged_records == THREADS * TIMES
