"""The shrinker: writes segments back and gives their memory to the system.

One background task keeps the pool below its watermarks, releases what became empty, and punches holes. `shrink` does on request
what the background does by itself. In each, some threads write and another one releases memory. (Two threads that each do both
reached 70% of fio's rate; this split 80%.) How many write is found by trial (policy/writers.py). At first it is one, or two where
the tier encrypts: one encrypts while the disk is busy with what the other has encrypted. The background works in steps of STEP_S,
so that a number that was found is in force soon; a step ends with the writes under way.

A write that fails leaves its segment in RAM. The shrinker says so (`FreeFrames.stuck`, control/state), refuses waiting stores and
tries again every RETRY_S, until a write succeeds or nothing waits to be written.

Invariants:
1. Memory is released only after the write of its segment was committed.
2. Every plan taken from the store is committed or aborted, whatever the tier or the kernel answers.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from tmemfs.errors import BackingFull, TierError
from tmemfs.jobs.executor import Executor
from tmemfs.jobs.full_tier import FullTier
from tmemfs.jobs.holes import Holes
from tmemfs.jobs.merger import Merger
from tmemfs.jobs.notices import Notices
from tmemfs.jobs.pool_size import PoolSize
from tmemfs.jobs.reserve import Reserve
from tmemfs.jobs.shrink_request import EMPTY, ShrinkAnswer, ShrinkRequest, Tally
from tmemfs.jobs.stop import DEADLINE_PASSED, INTERRUPTED, finish
from tmemfs.pages.free_frames import FreeFrames
from tmemfs.policy.writers import Writers, after
from tmemfs.store.plans import WriteBack
from tmemfs.store.tmem import Tmem
from tmemfs.system.memory import punch
from tmemfs.tiers.tier import MOST_WRITERS, Tier
from tmemfs.units import SEGMENT_BYTES

log = logging.getLogger(__name__)

#: While the tier is full or fails, one segment is tried again this often.
RETRY_S: Final = 0.25
#: The background looks again at what there is to do after this long.
STEP_S: Final = 0.5
#: Threads that write to a tier that encrypts, at first.
_ENCRYPTING_WRITERS: Final = 2
#: How often a shrink that waits for a merge looks whether that has ended.
_OTHERS_S: Final = 0.002
_NOT_RUNNING: Final = "the shrinker is not running"


@dataclass(slots=True)
class ShrinkCounts:
    """Since the start; pages that were live when their segment was planned, bytes in whole blocks."""

    segments: int = 0
    pages: int = 0
    written_bytes: int = 0
    write_errors: int = 0
    released_bytes: int = 0
    shrinks: int = 0
    shrinks_short: int = 0


class _Pair:
    """MOST_WRITERS threads to write and one to release."""

    def __init__(self, name: str) -> None:
        self.write = Executor(f"{name}-write", MOST_WRITERS)
        self.release = Executor(f"{name}-release")


class Shrinker:
    """Shrinks the pool of `tmem` onto `tier`, in the background to the watermarks of `size`. `run` must be running in trio."""

    def __init__(
        self,
        tmem: Tmem,
        tier: Tier,
        holes: Holes,
        size: PoolSize,
        notices: Notices,
        free_frames: FreeFrames,
        reserve: Reserve,
        merger: Merger,
        full_tier: FullTier,
    ) -> None:
        # constant after construction
        self._tmem = tmem
        self._tier = tier
        self._holes = holes
        self._size = size
        self._notices = notices
        self._free_frames = free_frames
        self._reserve = reserve
        self._merger = merger
        self._full_tier = full_tier
        self._background, self._requested = _Pair("background"), _Pair("request")
        self._one_request = trio.Lock()
        # in trio's thread
        self.last: ShrinkAnswer | None = None
        self.writers = Writers.first(1, MOST_WRITERS, _ENCRYPTING_WRITERS if tier.is_encrypted else 1)
        self._under_way = self._begun = 0
        # guarded by the lock: both pairs of threads count
        self._lock = threading.Lock()
        self.counts = ShrinkCounts()

    @property
    def executors(self) -> tuple[Executor, ...]:
        """Its threads."""
        pairs = (self._background, self._requested)
        return (*(executor for pair in pairs for executor in (pair.write, pair.release)), self._reserve.executor)

    # ---- in trio ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look after the pool until cancelled."""
        with self._notices.delivered():
            self._tmem.arena.allow_cold(False)  # from now on the reserve faults frames in, and stores only take those
            self._free_frames.set_stuck(None)  # what the last run found is not known any more
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._reserve.run)
                    await self._look_on()
            finally:
                self._tmem.arena.allow_cold(True)
                # Otherwise a store waits for ever, and what waits for that store does not end either.
                self._free_frames.set_stuck(_NOT_RUNNING)

    def failed(self, why: str) -> None:
        """`run` has failed, and will be started again: until it frees frames, stores are refused rather than left waiting."""
        self._free_frames.set_stuck(why)

    def look_again(self) -> None:
        """Limits have changed: see what there is to do."""
        self._notices()

    async def shrink(self, request: ShrinkRequest) -> ShrinkAnswer:
        """Free what is asked for, sealing the open segments if that takes it; returns when it is done or cannot go on.

        Ends after the segments under way when it is cancelled: then `last` says how far it came.
        """
        tally = Tally(request, include_open=True, is_request=True, writers=self.writers.count)

        async def work() -> ShrinkAnswer:
            answer = await self._free(tally, self._requested)
            await self._requested.write.run(partial(self._tidy, again=True))
            self.counts.shrinks += 1
            self.counts.shrinks_short += answer.reason is not None
            self.last = answer
            return answer

        async with self._one_request:  # its threads do one after the other: who waits for them can still be interrupted here
            return await finish(work, lambda: tally.stop(INTERRUPTED))

    async def _look_on(self) -> None:
        is_shrinking = False
        while True:
            self._notices.shrinker.clear()
            self._notices.rearm()
            self._notices.reserve.set()  # a notice that came while another one was pending was for the reserve, too
            if self._tmem.arena.has_releasing or self._tmem.arena.takes_cold or self._holes.is_due:
                await self._background.write.run(self._tidy)
            self._notices.cleaner.set()
            self._notices.write_ahead.set()
            goal = await self._goal(is_shrinking)
            is_shrinking = goal > 0 and await self._step(goal)
            await self._rest(is_shrinking)

    async def _goal(self, is_shrinking: bool) -> int:
        """Bytes to free now. A segment at least while stores may wait: `stuck` ends only with a write that succeeds."""
        goal = self._size.background_goal(is_shrinking) if self._tier.capacity_bytes else 0
        if goal:  # at once, whether or not the system is about to give a frame
            return goal
        wait_s = self._reserve.frame_s if self._tier.capacity_bytes else math.inf  # without a tier there is nothing else to do
        is_needed = self._free_frames.stuck or not await self._reserve.has_frame_soon(wait_s)
        return SEGMENT_BYTES if is_needed else 0

    async def _rest(self, is_shrinking: bool) -> None:
        """Until there may be something to do."""
        if self._free_frames.stuck:
            await trio.sleep(RETRY_S)  # no notice tells that a tier takes writes again
        elif not is_shrinking:
            with trio.move_on_after(self._holes.wait_s):
                await self._notices.shrinker.wait()

    async def _step(self, goal: int) -> bool:
        """Free up to `goal` bytes in the background; whether to go on at once."""
        include_open = not self._tmem.arena.has_free_frame
        tally = Tally(ShrinkRequest(goal, STEP_S), include_open, writers=self.writers.count)
        answer = await self._free(tally, self._background)
        # On a busy machine the time may be over before a thread could begin; no notice would come for what is left.
        return (answer.freed + answer.written > 0 or answer.reason == DEADLINE_PASSED) and self._free_frames.stuck is None

    async def _free(self, tally: Tally, pair: _Pair) -> ShrinkAnswer:
        await trio.lowlevel.checkpoint_if_cancelled()
        self._under_way += 1
        self._begun += 1
        is_alone, begun = self._under_way == 1, self._begun
        try:
            with trio.CancelScope(shield=True):  # all or none: the thread that releases waits for those that write
                async with trio.open_nursery() as nursery:
                    for _ in range(tally.writers):
                        nursery.start_soon(pair.write.run, partial(self._write_back_while, tally))
                    nursery.start_soon(pair.release.run, partial(self._release_while, tally))
        finally:
            self._under_way -= 1
        self._say_whether_stuck(tally)
        answer = tally.answer()
        if is_alone and begun == self._begun:  # a rate beside that of another shrink says nothing of the number
            self._note_rate(tally, answer)
        return answer

    def _note_rate(self, tally: Tally, answer: ShrinkAnswer) -> None:
        """Have the next shrink written by as many threads as the rate of this one suggests."""
        if tally.writers == self.writers.count:
            self.writers = after(self.writers, answer.written, answer.seconds, time.monotonic())

    def _say_whether_stuck(self, tally: Tally) -> None:
        """A shrink that met the tier knows whether frames can be freed; one that did not, knows only that none is needed."""
        if tally.stuck is None and not tally.written and self._tmem.has_victims:
            return
        if tally.stuck != self._free_frames.stuck:
            log.warning("no frame can be freed: %s", tally.stuck) if tally.stuck else log.info("frames can be freed again")
            self._free_frames.set_stuck(tally.stuck)

    # ---- in the threads that write ---------------------------------------------------------------------------------

    def _write_back_while(self, tally: Tally) -> None:
        """Write segments back as long as `tally` wants more."""
        try:
            while tally.claim() and self._write_back_one(tally):
                tally.written_back.release()
        except TierError as error:
            tally.stop(str(error), stuck=True)
        finally:
            tally.end()

    def _write_back_one(self, tally: Tally) -> bool:
        """One step: write a segment back, or on a full tier free something else. Whether to go on. Raises TierError."""
        try:
            return self._merge_or_write_back(tally)
        except BackingFull:
            frames = self._full_tier.free_frame_or_extent()
            if frames is None:
                raise
            tally.done(0, 0, frames * SEGMENT_BYTES)
            self._holes.punch()  # an extent that was cleaned can be taken only once its hole is punched
            return True

    def _merge_or_write_back(self, tally: Tally) -> bool:
        """Drop a clean copy, merge a sparse victim, or write a dense one back; whether to go on. Raises TierError."""
        # A clean copy first: its frame costs no I/O.
        if (frames := self._tmem.drop_clean()) is not None:
            tally.done(0, 0, frames * SEGMENT_BYTES)
            return True
        # A sparse segment is merged first: written as it is, it would take an extent for what is mostly dead.
        if merge := self._tmem.plan_merge_before_write(tally.include_open):
            tally.done(0, 0, self._merger.merge_in_ram(merge) * SEGMENT_BYTES)
        elif plan := self._plan_write_back(tally):
            self._write_back(plan, tally)
        else:
            return self._await_others(tally)
        return True

    def _plan_write_back(self, tally: Tally) -> WriteBack | None:
        """The store's plan, made again without what is dead on the tier if that leaves no extent. Raises BackingFull."""
        try:
            return self._tmem.plan_write_back(tally.include_open)
        except BackingFull:
            self._holes.punch()
            return self._tmem.plan_write_back(tally.include_open)

    def _await_others(self, tally: Tally) -> bool:
        """There is no victim. Wait for what a merge or another shrink holds; whether there is more to do then.

        The background does not wait: what it is to free is counted by what the pool holds, and it is woken when that changes.
        """
        if not tally.is_request or not self._tmem.is_held_elsewhere:
            tally.give_back_claim()
            tally.stop(EMPTY)
            return False
        while self._tmem.is_held_elsewhere and not self._tmem.has_victims and not tally.is_to_end:
            time.sleep(_OTHERS_S)
        tally.give_back_claim()
        return True

    def _write_back(self, plan: WriteBack, tally: Tally) -> None:
        """Perform `plan`. Raises TierError."""
        try:
            self._tier.write(plan.extent, plan.data, plan.sequence)
        except BaseException:
            self._tmem.abort_write_back(plan)
            with self._lock:
                self.counts.write_errors += 1
            raise
        is_released = self._tmem.commit_write_back(plan)
        tally.done(len(plan.data), plan.pages, SEGMENT_BYTES if is_released else 0)
        self.count_written(plan)

    def count_written(self, plan: WriteBack) -> None:
        """The segment of `plan` was written to the tier. In any thread."""
        with self._lock:
            self.counts.segments += 1
            self.counts.pages += plan.pages
            self.counts.written_bytes += len(plan.data)

    def _tidy(self, again: bool = False) -> None:
        """Release frames, punch holes (`again`: also those put off), and fill the reserve if nobody else does."""
        self._release()
        self._holes.punch(again)
        if self._tmem.arena.takes_cold:
            self._reserve.fill()

    # ---- in the thread that releases -------------------------------------------------------------------------------

    def _release_while(self, tally: Tally) -> None:
        """Release memory while segments are written."""
        while not tally.is_over:
            tally.written_back.acquire()
            self._release()

    def _release(self) -> None:
        """Give the memory of frames that are not needed back to the system."""
        while plan := self._tmem.reclaim.plan_release():
            try:
                for frame in plan.frames:
                    punch(self._tmem.arena.region.fd, frame * SEGMENT_BYTES, SEGMENT_BYTES)
            except OSError as error:
                self._tmem.reclaim.abort_release(plan)
                log.error("memory could not be released: %s", error)
                return
            except BaseException:
                self._tmem.reclaim.abort_release(plan)
                raise
            self._tmem.reclaim.commit_release(plan)
            with self._lock:
                self.counts.released_bytes += len(plan.frames) * SEGMENT_BYTES
