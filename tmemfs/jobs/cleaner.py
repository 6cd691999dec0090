"""The cleaner: decides when sparse segments are merged, in RAM and on the tier. The merger performs it.

It works in the background, by the thresholds of the policy (policy/cleaning.py) and within the budget, and on request (`compact`).
After a refused store it pauses.

Thread-safety: `run`, `compact` and `set_budget` in trio.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

import trio

from tmemfs.errors import TierError
from tmemfs.jobs.compact_request import CompactAnswer, CompactRequest
from tmemfs.jobs.executor import Executor
from tmemfs.jobs.merger import Merger
from tmemfs.jobs.notices import Wakeup
from tmemfs.jobs.stop import Stop, Stopped, finish
from tmemfs.jobs.throttle import Throttle
from tmemfs.policy.cleaning import cleaning_wanted, compaction_wanted
from tmemfs.store.merges import Merges
from tmemfs.system.memory import ordinary_thread
from tmemfs.units import BLOCK_BYTES

log = logging.getLogger(__name__)

#: How long the cleaner stands back after a store was refused, or the tier failed.
_STAND_BACK_S: Final = 0.25


class Cleaner:
    """Has `merger` perform the merges of `merges` when they are wanted.

    `wakeup` says that something was written or became empty, `refused` how many stores were refused so far. `background` is the
    thread for what gives way to everything else.
    """

    def __init__(
        self,
        merges: Merges,
        merger: Merger,
        throttle: Throttle,
        wakeup: Wakeup,
        refused: Callable[[], int],
        background: Executor,
    ) -> None:
        self.budget = merger.budget
        self.counts = merger.counts
        self.last: CompactAnswer | None = None
        self._merges = merges
        self._merger = merger
        self._throttle = throttle
        self._wakeup = wakeup
        self._refused = refused
        self._one_request = trio.Lock()
        self._background = background
        self._requested = Executor("compact")

    @property
    def executors(self) -> tuple[Executor, ...]:
        """Its threads."""
        return self._background, self._requested

    async def run(self) -> None:
        """Merge and clean in the background until cancelled."""
        compacting, cleaning, refused = False, False, 0
        while True:
            self._wakeup.clear()  # before the look at the space, so that what changes after it is not missed
            # RAM first: a merge there costs no I/O, and what is dense in RAM is dense when it is written.
            compacting = compaction_wanted(self._merges.space_in_ram(), compacting)
            if compacting and await self._background.run(self._compact_one):
                continue
            cleaning = cleaning_wanted(self._merges.space(), cleaning)
            wait_s = self._merger.wait_s if cleaning else math.inf
            if wait_s:
                with trio.move_on_after(wait_s):
                    await self._wakeup.wait()
            elif self._refused() != refused:
                # The shrinker, which stores wait for, has the tier to itself for a moment.
                refused = self._refused()
                self._merger.note_pause(_STAND_BACK_S)
                await trio.sleep(_STAND_BACK_S)
            elif not await self._clean_in_background():
                # Wanted, but nothing gains: only a change of the store can alter that.
                await self._wakeup.wait()

    def _compact_one(self) -> bool:
        ordinary_thread()  # in the thread itself: it inherited the real-time priority of the page path
        return self._merger.compact_one()

    async def _clean_in_background(self) -> bool:
        """One cleaning; whether there was something to clean. A tier that fails is left alone for a while."""
        try:
            return await self._background.run(self._clean_one)
        except TierError as error:
            log.warning("cleaning failed: %s", error)
            self._merger.note_failure()
            await trio.sleep(_STAND_BACK_S)
            return True  # what was to be cleaned is still there

    def _clean_one(self) -> bool:
        ordinary_thread()
        return self._merger.clean()

    def set_budget(self, rate: float | None = None, daily: float | None = None) -> None:
        """Change what may be written: bytes per second, bytes in 24 hours."""
        self._merger.set_budget(rate, daily)
        self._wakeup.set()  # it may be waiting for the old budget

    async def compact(self, request: CompactRequest) -> CompactAnswer:
        """Merge in RAM, then clean until the tier's amplification is what is asked for, or nothing more can be gained.

        Ends early at its deadline, or when it is cancelled: then `last` says how far it came.
        """
        stop = Stop(request.deadline_s)

        async def work() -> CompactAnswer:
            self.last = await self._requested.run(partial(self._compact, request.factor, stop))
            return self.last

        async with self._one_request:  # a second request waits here, where it can be interrupted at once
            with self._throttle.hurry():
                return await finish(work, stop.stop)

    def _compact(self, factor: float, stop: Stop) -> CompactAnswer:
        ordinary_thread()
        # A copy: the store goes on counting in the object, and the background may merge at the same time.
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
        # It ends: a merge that gains nothing sets its sources aside, and each other one makes a frame free.
        while plan := self._merges.plan_compact():
            self._merger.merge_in_ram(plan, stop=stop)
            stop.check()
        while self._merges.space().amplification > factor:
            stop.check()
            if not self._merger.clean(BLOCK_BYTES, stop):
                return "nothing more can be gained"
        return None
