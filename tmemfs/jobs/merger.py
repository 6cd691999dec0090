"""The merger: performs the merges that the store plans, in RAM and on the tier. It decides nothing: callers say when, and how much.

A merge in RAM copies records from frames to a frame. A cleaning reads segments from the tier, and writes their live records to a
new extent. It uses two buffers of one segment: the arena's kept frames, or two that are made where it has none. Nothing comes back
into the pool.

It gives way: between records it pauses (throttle.py), and before each read from the tier it waits while faults wait for the tier.

Thread-safety: any thread. One cleaning at a time, because there is one pair of buffers.

Invariants:
1. An extent is retired only after the handles of its records were moved, and those only after the new extent was written.
2. Every merge taken from the store is committed or aborted, whatever the tier answers.
3. A merge that gains nothing, in the layout that would be written, is not written.
4. Work with a `stop` ends soon after it is stopped: between two records that are copied, or after the handles that a merge moves.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
from dataclasses import dataclass
from typing import Final

from tmemfs.errors import TierError
from tmemfs.jobs.holes import Holes
from tmemfs.jobs.stop import Stop
from tmemfs.jobs.throttle import Throttle
from tmemfs.pages.reader import Reader
from tmemfs.policy.budget import Budget
from tmemfs.store.merge_plans import Copied, Merge, Pause, no_pause
from tmemfs.store.merges import LEAST_GAIN_BYTES
from tmemfs.store.tmem import Tmem
from tmemfs.tiers.tier import Tier
from tmemfs.units import SEGMENT_BYTES

log = logging.getLogger(__name__)

#: Bytes per second that cleaning may write in the background, unless set otherwise.
DEFAULT_RATE: Final = 64 << 20
#: Faults that wait for the tier hold up a read of a cleaning for at most this long: a full tier needs the cleaning, too.
_GIVE_WAY_S: Final = 0.1
_LOOK_S: Final = 0.001


@dataclass(slots=True)
class CleanerCounts:
    """Since the start. Times that cleaning waited, for faults or after a refused store, and seconds of that."""

    pauses: int = 0
    paused_s: float = 0.0
    failures: int = 0


class Merger:
    """Performs merges of `tmem`, on `tier` within `budget`. The reads of `reader` go first."""

    def __init__(self, tmem: Tmem, tier: Tier, reader: Reader, holes: Holes, throttle: Throttle) -> None:
        # constant after construction
        self.budget = Budget(DEFAULT_RATE)
        self.counts = CleanerCounts()
        self._tmem = tmem
        self._merges = tmem.merges
        self._tier = tier
        self._reader = reader
        self._holes = holes
        self._throttle = throttle
        #: Guards `budget` and `counts`, which all threads that clean change.
        self._counting = threading.Lock()
        #: Held while the background compacts: a full tier that looks for a frame waits for that, and counts what it gained.
        self._in_ram = threading.Lock()
        #: Guards the two buffers.
        self._one_at_a_time = threading.Lock()
        self._into, self._from = tmem.arena.buffers() or (_buffer(), _buffer())

    @property
    def merges_done(self) -> int:
        """Merges that gained something, since the start."""
        return self._merges.counts.compactions + self._merges.counts.cleanings

    # ---- in RAM ----------------------------------------------------------------------------------------------------

    def merge_in_ram(self, plan: Merge, pause: Pause = no_pause, stop: Stop | None = None) -> int:
        """Perform a merge of segments in RAM, if anything is gained; how many frames the system gets back. Raises Stopped."""
        try:
            copied = self._merges.copy_in_ram(plan, _checking(pause, stop))
        except BaseException:  # Stopped, or a bug: a plan that nobody ends keeps its segments out of every list
            self._merges.abort(plan)
            raise
        if not self._merges.gains(plan, copied):
            self._merges.abort(plan, copied.damaged, gains=False)
            return 0
        return self._merges.commit(plan, copied, pause)

    def compact_one(self) -> bool:
        """One merge in RAM, giving way to requests; whether there was something to merge."""
        with self._in_ram:
            plan = self._merges.plan_compact()
            if plan:
                self.merge_in_ram(plan, self._throttle)
        return plan is not None

    def compact_until_gain(self) -> int | None:
        """Merge in RAM until one merge gains a frame; how many the system gets back, None if none gains."""
        with self._in_ram:
            while plan := self._merges.plan_compact():
                gained = self._merges.counts.gained_frames
                frames = self.merge_in_ram(plan)
                if self._merges.counts.gained_frames > gained:
                    return frames
        return None

    # ---- on the tier -----------------------------------------------------------------------------------------------

    def clean(self, least_gain_bytes: int = LEAST_GAIN_BYTES, stop: Stop | None = None) -> bool:
        """One cleaning on the tier that gains something; whether there was one. Raises TierError, Stopped."""
        # Waiting for a lock cannot be interrupted, so work that can be stopped polls for it.
        while not self._one_at_a_time.acquire(timeout=_LOOK_S if stop else -1):
            if stop:
                stop.check()
        try:
            # One that gains nothing has its sources set aside, so the next plan is another one.
            while plan := self._plan_clean(least_gain_bytes):
                if self._clean(plan, stop):
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

    def _clean(self, plan: Merge, stop: Stop | None) -> bool:
        """Clean as planned, if anything is gained by that; whether it was. Raises TierError, Stopped."""
        copied = Copied(self._into)
        try:
            # The store's lock is not held: a record that is invalidated meanwhile is copied in vain, and the commit moves no handle
            # that has changed.
            self._gather(plan, copied, stop)
            gains = self._merges.gains(plan, copied)
            # The new extent is written before any handle moves (invariant 1): an error here leaves every record where it was.
            if gains and copied.fill:
                assert plan.extent is not None
                self._tier.write(plan.extent, copied.data, plan.sequence, for_cleaning=True)
        except BaseException:
            self._merges.abort(plan, copied.damaged)
            raise
        if not gains:
            self._merges.abort(plan, copied.damaged, gains=False)
            return False
        self._merges.commit(plan, copied, self._throttle)
        with self._counting:
            self.budget.spend(len(copied.data), time.monotonic())
        return True

    def _gather(self, plan: Merge, copied: Copied, stop: Stop | None) -> None:
        """Copy the live records of the sources. A source that cannot be read stays, and is not tried again. Raises Stopped."""
        pause = _checking(self._throttle, stop)
        for source in plan.sources:
            self._give_way(stop)
            data = self._from[: source.size_bytes]
            try:
                self._tier.read(source.extent, 0, data, source.sequence)
            except TierError as error:
                log.warning("a segment cannot be cleaned: %s", error)
                self.note_failure()
                copied.damaged.add(source.segment)
                continue  # the other sources may gain enough without it
            self._merges.copy(plan, source, data, copied, pause)
            if copied.is_full:  # the rest of the sources would be read for nothing
                return

    def _give_way(self, stop: Stop | None) -> None:
        """Wait while faults wait for the tier. Raises Stopped."""
        began = time.monotonic()
        # Read without the reader's lock: one fault more or less ahead of this read does not matter.
        while self._reader.waiting and time.monotonic() - began < _GIVE_WAY_S:
            time.sleep(_LOOK_S)
            if stop:
                stop.check()
        if (paused_s := time.monotonic() - began) > _LOOK_S:
            self.note_pause(paused_s)

    # ---- budget and counters ---------------------------------------------------------------------------------------

    @property
    def has_budget(self) -> bool:
        """Whether today's budget is not used up; the rate does not count where an extent is needed at once."""
        with self._counting:
            return self.budget.left_today(time.monotonic()) > 0

    @property
    def wait_s(self) -> float:
        """Seconds until the budget allows the next cleaning in the background."""
        with self._counting:
            return self.budget.wait_s(time.monotonic())

    def set_budget(self, rate: float | None = None, daily: float | None = None) -> None:
        """Change what cleaning may write: bytes per second, bytes in 24 hours."""
        with self._counting:
            self.budget.set(rate, daily)

    def note_pause(self, seconds: float) -> None:
        """Cleaning has waited for `seconds`."""
        with self._counting:
            self.counts.pauses += 1
            self.counts.paused_s += seconds

    def note_failure(self) -> None:
        """The tier failed a cleaning."""
        with self._counting:
            self.counts.failures += 1


def _checking(pause: Pause, stop: Stop | None) -> Pause:
    """`pause`, except that it raises Stopped when the work is to end."""
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
