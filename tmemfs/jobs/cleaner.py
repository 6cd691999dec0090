"""The cleaner: performs merges, in RAM before segments are written back, and on the tier while too much of it is dead.

On the tier it works in the background, by the thresholds of the policy and within its budget, and on request (`compact`). It gives
way: between records it lets go of the interpreter, before each read from the tier it waits while faults do, and after a refused
store it pauses. When the tier is full the shrinker asks it for room, whatever the thresholds say.

Each cleaning goes through two buffers of one segment: the arena's kept frames, or two that are made where it has none; nothing
comes back into the pool.

Invariants:
1. An extent is given back only after the handles of its records were moved, and those only after the new extent was written.
2. Every merge taken from the store is committed or aborted, whatever the tier answers.
3. A merge that gains nothing, in the layout that would be written, is not written.
4. `compact` ends soon after it is stopped: between two records that are copied, or after the handles that a merge moves.

Thread-safety: `merge_in_ram` and `make_room` from any thread; `run` and `compact` in trio.
"""

from __future__ import annotations

import logging
import math
import mmap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import trio

from tmemfs.errors import TierError
from tmemfs.jobs.compaction import CompactAnswer, CompactRequest
from tmemfs.jobs.executor import Executor
from tmemfs.jobs.holes import Holes
from tmemfs.jobs.stop import Stop, Stopped, finish
from tmemfs.jobs.throttle import Throttle
from tmemfs.pages.reader import Reader
from tmemfs.policy.budget import Budget
from tmemfs.policy.cleaning import cleaning_wanted, compaction_wanted
from tmemfs.store.merges import LEAST_GAIN_BYTES, Copied, Merge, Pause, no_pause
from tmemfs.store.tmem import Tmem
from tmemfs.system.memory import ordinary_thread
from tmemfs.tiers.tier import Tier
from tmemfs.units import BLOCK_BYTES, SEGMENT_BYTES

log = logging.getLogger(__name__)

#: Bytes a second in the background, unless set otherwise.
DEFAULT_RATE: Final = 64 << 20
#: Faults that wait for the tier hold a read of the cleaner up, this long at most.
_GIVE_WAY_S: Final = 0.1
_LOOK_S: Final = 0.001
#: How long the cleaner stands back after a store was refused, or the tier failed.
_STAND_BACK_S: Final = 0.25


@dataclass(slots=True)
class CleanerCounts:
    """Since the start. Times it waited, for faults or after a refused store, and seconds of that. Guarded by a lock."""

    pauses: int = 0
    paused_s: float = 0.0
    failures: int = 0


class Cleaner:
    """Merges segments of `tmem` in RAM and on `tier`. `refused` says how many stores were refused so far."""

    def __init__(self, tmem: Tmem, tier: Tier, reader: Reader, holes: Holes) -> None:
        self.budget = Budget(DEFAULT_RATE)
        self.counts = CleanerCounts()
        self.last: CompactAnswer | None = None
        self.refused: Callable[[], int] = lambda: 0
        self._merges = tmem.merges
        self._tmem = tmem
        self._tier = tier
        self._reader = reader
        self._holes = holes
        self._throttle = Throttle(tmem)
        self._counting = threading.Lock()
        self._one_request = trio.Lock()
        self._one_at_a_time = threading.Lock()
        self._in_ram = threading.Lock()
        self._into, self._from = tmem.arena.buffers() or (_buffer(), _buffer())
        self._kicked = trio.Event()
        #: For what gives way to everything else; the recompressor works there, too.
        self.background = Executor("maintenance")
        self._requested = Executor("compact")

    @property
    def executors(self) -> tuple[Executor, ...]:
        """Its threads."""
        return self.background, self._requested

    def merge_in_ram(self, plan: Merge, pause: Pause = no_pause, stop: Stop | None = None) -> int:
        """Perform a merge of segments in RAM, if anything is gained; how many frames go back to the system. Raises Stopped."""
        try:
            copied = self._merges.copy_in_ram(plan, _checking(pause, stop))
        except BaseException:
            self._merges.abort(plan)
            raise
        if not self._merges.gains(plan, copied):
            self._merges.abort(plan, copied.damaged, gains=False)
            return 0
        return self._merges.commit(plan, copied, pause)

    def make_room(self) -> int | None:
        """A tier is full: merge in RAM, which frees frames, else clean on the tier. Frames that go; None: nothing can be gained.

        What goes on in the background already is waited for, and counts. Raises TierError.
        """
        before = self._merges_done
        with self._throttle.hurry():
            with self._in_ram:
                while plan := self._merges.plan_compact():
                    gained = self._merges.counts.gained_frames
                    frames = self.merge_in_ram(plan)
                    if self._merges.counts.gained_frames > gained:
                        return frames
            if self._budget_allows() and self._clean(BLOCK_BYTES):
                return 0
        return 0 if self._merges_done != before else None

    @property
    def _merges_done(self) -> int:
        return self._merges.counts.compactions + self._merges.counts.cleanings

    async def run(self) -> None:
        """Merge and clean in the background until cancelled."""
        compacting, cleaning, refused = False, False, 0
        while True:
            self._kicked = trio.Event()
            compacting = compaction_wanted(self._merges.space_in_ram(), compacting)
            if compacting and await self.background.run(self._compact_one):
                continue
            cleaning = cleaning_wanted(self._merges.space(), cleaning)
            wait_s = self._wait_s() if cleaning else math.inf
            if wait_s:
                with trio.move_on_after(wait_s):
                    await self._kicked.wait()
            elif self.refused() != refused:
                refused = self.refused()
                self._paused(_STAND_BACK_S)
                await trio.sleep(_STAND_BACK_S)
            elif not await self._clean_in_background():
                await self._kicked.wait()

    def _compact_one(self) -> bool:
        """One merge in RAM; whether there was something to merge."""
        ordinary_thread()
        with self._in_ram:
            plan = self._merges.plan_compact()
            if plan:
                self.merge_in_ram(plan, self._throttle)
        return plan is not None

    async def _clean_in_background(self) -> bool:
        """One cleaning; whether there was something to clean. A tier that fails is left alone for a while."""
        try:
            return await self.background.run(self._clean_one)
        except TierError as error:
            log.warning("cleaning failed: %s", error)
            self._failed()
            await trio.sleep(_STAND_BACK_S)
            return True

    def _clean_one(self) -> bool:
        """One cleaning on the tier; whether there was something to clean. Raises TierError."""
        ordinary_thread()
        return self._clean()

    def look(self) -> None:
        """Something was written or has died: see whether there is something to do. In trio's thread."""
        self._kicked.set()

    def set_budget(self, rate: float | None = None, daily: float | None = None) -> None:
        """Change what may be written: bytes a second, bytes a day."""
        self.budget.set(rate, daily)
        self.look()

    async def compact(self, request: CompactRequest) -> CompactAnswer:
        """Merge in RAM, then clean until the tier's amplification is what is asked for, or nothing more can be gained.

        Ends early at its deadline, or when it is cancelled: then `last` says how far it came.
        """
        stop = Stop(request.deadline_s)

        async def work() -> CompactAnswer:
            self.last = await self._requested.run(partial(self._compact, request.factor, stop))
            return self.last

        async with self._one_request:
            with self._throttle.hurry():
                return await finish(work, stop.stop)

    def _compact(self, factor: float, stop: Stop) -> CompactAnswer:
        ordinary_thread()
        began, before, counts = time.monotonic(), self._merges.space().amplification, replace(self._merges.counts)
        try:
            reason = self._compact_until(factor, stop)
        except (TierError, Stopped) as error:
            reason = str(error)
        after, now = self._merges.space().amplification, self._merges.counts
        return CompactAnswer(
            factor,
            before,
            after,
            now.gained_frames - counts.gained_frames,
            now.cleaned_segments - counts.cleaned_segments,
            now.cleaned_bytes - counts.cleaned_bytes,
            time.monotonic() - began,
            reason,
        )

    def _compact_until(self, factor: float, stop: Stop) -> str | None:
        """Why no more is done before `factor` is reached; None: it is. Raises TierError, Stopped."""
        while plan := self._merges.plan_compact():
            self.merge_in_ram(plan, stop=stop)
            stop.check()
        while self._merges.space().amplification > factor:
            stop.check()
            if not self._clean(BLOCK_BYTES, stop):
                return "nothing more can be gained"
        return None

    def _clean(self, least_gain_bytes: int = LEAST_GAIN_BYTES, stop: Stop | None = None) -> bool:
        """One cleaning on the tier that gains something; whether there was one. Raises TierError, Stopped."""
        while not self._one_at_a_time.acquire(timeout=_LOOK_S if stop else -1):
            if stop:
                stop.check()
        try:
            while plan := self._plan_clean(least_gain_bytes):
                if self._perform(plan, stop):
                    return True
        finally:
            self._one_at_a_time.release()
        return False

    def _plan_clean(self, least_gain_bytes: int) -> Merge | None:
        """The store's plan; made again without what is dead on the tier if that may have left no extent for it."""
        plan = self._merges.plan_clean(least_gain_bytes)
        if plan is None and self._tmem.extents.retired_bytes:
            self._holes.punch()
            plan = self._merges.plan_clean(least_gain_bytes)
        return plan

    def _perform(self, plan: Merge, stop: Stop | None) -> bool:
        """Clean as planned, if anything is gained by that; whether it was. Raises TierError, Stopped."""
        copied = Copied(self._into)
        try:
            self._gather(plan, copied, stop)
            gains = self._merges.gains(plan, copied)
            if gains and copied.fill:
                assert plan.extent is not None
                self._tier.write(plan.extent, copied.data, for_cleaning=True)
        except BaseException:
            self._merges.abort(plan, copied.damaged)
            raise
        if gains:
            self._merges.commit(plan, copied, self._throttle)
            with self._counting:
                self.budget.spend(len(copied.data), time.monotonic())
        else:
            self._merges.abort(plan, copied.damaged, gains=False)
        return gains

    def _gather(self, plan: Merge, copied: Copied, stop: Stop | None) -> None:
        """Copy what lives of the sources; one that cannot be read stays where it is, and is not tried again. Raises Stopped."""
        pause = _checking(self._throttle, stop)
        for source in plan.sources:
            self._give_way(stop)
            data = self._from[: source.size_bytes]
            try:
                self._tier.read(source.extent, 0, data)
            except TierError as error:
                log.warning("a segment cannot be cleaned: %s", error)
                self._failed()
                copied.damaged.add(source.segment)
                continue
            self._merges.copy(plan, source, data, copied, pause)
            if copied.is_full:
                return

    def _budget_allows(self) -> bool:
        """Whether today's budget is not used up; the rate does not count where room is needed."""
        return self.budget.left_today(time.monotonic()) > 0

    def _wait_s(self) -> float:
        with self._counting:
            return self.budget.wait_s(time.monotonic())

    def _give_way(self, stop: Stop | None) -> None:
        """Wait while faults wait for the tier. Raises Stopped."""
        began = time.monotonic()
        while self._reader.waiting and time.monotonic() - began < _GIVE_WAY_S:
            time.sleep(_LOOK_S)
            if stop:
                stop.check()
        if (paused_s := time.monotonic() - began) > _LOOK_S:
            self._paused(paused_s)

    def _paused(self, seconds: float) -> None:
        with self._counting:
            self.counts.pauses += 1
            self.counts.paused_s += seconds

    def _failed(self) -> None:
        with self._counting:
            self.counts.failures += 1


def _checking(pause: Pause, stop: Stop | None) -> Pause:
    """`pause`, but that it raises Stopped when the work is to end."""
    if stop is None:
        return pause

    def check_and_pause() -> None:
        stop.check()
        pause()

    return check_and_pause


def _buffer() -> memoryview:
    """A segment's worth of page-aligned, faulted-in memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    return memoryview(mmap.mmap(-1, SEGMENT_BYTES, flags=flags))
