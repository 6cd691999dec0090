"""The shrinker: writes segments back and gives their memory to the system.

One background task keeps the pool below its watermarks, gives back what died, punches holes and keeps the reserve of
faulted-in frames; `shrink` does on request what the background does by itself. Each works in two threads: one writes, the other
gives memory back. (Two threads that both do both reached 0.7 of what fio writes, these 0.8: writes to one file wait for each
other.) Both pairs of threads are executors, which exist before memory is short, and so does one more, which faults frames in: it
alone waits for the system's memory. Stores take only frames that have theirs.

A write that fails leaves its segment in RAM. The shrinker says so (`FreeFrames.stuck`, control/state), refuses waiting stores and
tries again every RETRY_S, until a write succeeds or nothing waits to be written.

Invariants:
1. Memory is given back only after the write of its segment was committed.
2. Every plan taken from the store is committed or aborted, whatever the tier or the kernel answers.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from tmemfs.errors import BackingFull, BadValue, TierError
from tmemfs.jobs.cleaner import Cleaner
from tmemfs.jobs.executor import Executor
from tmemfs.jobs.holes import Holes
from tmemfs.jobs.stop import DEADLINE_PASSED, INTERRUPTED, finish
from tmemfs.pages.free_frames import FreeFrames
from tmemfs.policy.watermarks import Watermarks, background_goal
from tmemfs.store.merges import Merge
from tmemfs.store.plans import WriteBack
from tmemfs.store.tmem import Tmem
from tmemfs.system.memory import populate, punch
from tmemfs.tiers.tier import Tier
from tmemfs.units import SEGMENT_BYTES, parse_seconds, parse_size

log = logging.getLogger(__name__)

#: While the tier is full or fails, one segment is tried again this often.
RETRY_S: Final = 0.25
#: How often a shrink that waits for a merge looks whether that has ended.
_OTHERS_S: Final = 0.002
#: If a frame could not be had from the system for so long, one is written back instead: while memory is short, 25 times what it
#: takes; else a frame comes, and only a busy machine delays it (with memory that its host had to find first it took 4 ms).
SHORT_FRAME_S: Final = 0.02
FRAME_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class ShrinkRequest:
    """`goal_bytes` of RAM to free (inf: all of it), within `deadline_s` seconds."""

    goal_bytes: float
    deadline_s: float = math.inf

    @classmethod
    def parse(cls, text: str) -> ShrinkRequest:
        """'64M', '64M deadline=2s' or 'all'. Raises BadValue."""
        size, *settings = text.split() or [""]
        deadline_s = math.inf
        for setting in settings:
            key, _, value = setting.partition("=")
            if key != "deadline":
                raise BadValue(f"unknown setting {setting!r}: write for example '64M deadline=2s'")
            deadline_s = parse_seconds(value)
        goal = math.inf if size == "all" else parse_size(size)
        if not goal:
            raise BadValue("shrink needs a size above 0: write for example '64M', or 'all'")
        return cls(goal, deadline_s)


@dataclass(frozen=True, slots=True)
class ShrinkAnswer:
    """What a shrink did: bytes of RAM freed, bytes and pages written; `reason` says why it fell short, None if it did not."""

    requested: float
    freed: int
    written: int
    pages: int
    seconds: float
    reason: str | None


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


class _Tally:
    """One shrink under way: how much is claimed by its threads, and what they did."""

    def __init__(self, request: ShrinkRequest, include_open: bool, is_request: bool = False) -> None:
        self.request = request
        self.include_open = include_open
        self.is_request = is_request
        self.started = time.monotonic()
        self.claimed = self.freed = self.written = self.pages = 0
        self.reason: str | None = None
        self.stuck: str | None = None
        self.is_over = False
        self.written_back = threading.Semaphore(0)
        self._lock = threading.Lock()

    def claim(self) -> bool:
        """Whether one more segment is wanted."""
        with self._lock:
            if self.claimed >= self.request.goal_bytes or self.reason is not None:
                return False
            if time.monotonic() - self.started > self.request.deadline_s:
                self.reason = DEADLINE_PASSED
                return False
            self.claimed += SEGMENT_BYTES
            return True

    @property
    def is_to_end(self) -> bool:
        """Whether it was stopped, or its deadline has passed."""
        return self.reason is not None or time.monotonic() - self.started > self.request.deadline_s

    def give_back_claim(self) -> None:
        """Nothing was there for the last claim."""
        with self._lock:
            self.claimed -= SEGMENT_BYTES

    def done(self, written: int, pages: int, freed: int) -> None:
        """One segment was written back; if the reserve took its frame, another one is wanted for it."""
        with self._lock:
            self.freed += freed
            self.claimed -= SEGMENT_BYTES - freed
            self.written += written
            self.pages += pages

    def stop(self, reason: str, stuck: bool = False) -> None:
        """Nothing more can be done, because of `reason`; the first one stands. `stuck`: the tier takes no more."""
        with self._lock:
            self.reason = self.reason or reason
            self.stuck = self.stuck or (reason if stuck else None)

    def answer(self) -> ShrinkAnswer:
        """What came of it."""
        short = self.freed < self.request.goal_bytes and not (math.isinf(self.request.goal_bytes) and self.reason == _EMPTY)
        reason = (self.reason or "it was stopped") if short else None
        seconds = time.monotonic() - self.started
        return ShrinkAnswer(self.request.goal_bytes, self.freed, self.written, self.pages, seconds, reason)


_EMPTY: Final = "the pool holds no more pages"
_NOT_RUNNING: Final = "the shrinker is not running"


def _kick(token: trio.lowlevel.TrioToken, wake: Callable[[], None]) -> None:
    """Have `wake` called in trio. A store must not fail because the event loop has ended meanwhile."""
    with suppress(trio.RunFinishedError):
        token.run_sync_soon(wake)


class _Pair:
    """A thread to write and one to release."""

    def __init__(self, name: str) -> None:
        self.write = Executor(f"{name}-write")
        self.release = Executor(f"{name}-release")


class Shrinker:
    """Shrinks the pool of `tmem` onto `tier`, in the background by `marks`. `run` must be running in trio."""

    def __init__(self, tmem: Tmem, tier: Tier, holes: Holes, free_frames: FreeFrames, cleaner: Cleaner, marks: Watermarks) -> None:
        self.counts = ShrinkCounts()
        self.last: ShrinkAnswer | None = None
        self.marks = marks
        #: What the pool may hold while memory is short (pressure.py), in bytes.
        self.ceiling = math.inf
        #: How long a frame may take to come (pressure.py).
        self.frame_s = FRAME_S
        #: Called in trio's thread when frames were taken or have become free.
        self.moved: Callable[[], None] = lambda: None
        self._tmem = tmem
        self._tier = tier
        self._holes = holes
        self._free_frames = free_frames
        self._cleaner = cleaner
        self._lock = threading.Lock()
        self._one_request = trio.Lock()
        self._kicked = self._framed = self._short = trio.Event()
        self._kick: Callable[[], None] = lambda: None
        self._kick_pending = self._wants_frame = False
        self._background, self._requested = _Pair("background"), _Pair("request")
        self._grower = Executor("populate")
        tmem.notice = self._notice

    @property
    def executors(self) -> tuple[Executor, ...]:
        """Its threads."""
        pairs = (self._background, self._requested)
        return (*(executor for pair in pairs for executor in (pair.write, pair.release)), self._grower)

    async def run(self) -> None:
        """Look after the pool until cancelled."""
        token = trio.lowlevel.current_trio_token()
        self._kick = partial(_kick, token, self._wake)
        self._tmem.arena.takes_cold = False
        self._free_frames.set_stuck(None)  # what the last run found is not known any more
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._fill_reserve_on)
                await self._look_on()
        finally:
            self._kick = lambda: None
            self._tmem.arena.takes_cold = True
            self._free_frames.set_stuck(
                _NOT_RUNNING
            )  # else a store waits for ever, and what waits for that store does not end either

    def failed(self, why: str) -> None:
        """`run` has failed, and will be started again: until it makes room, stores are refused rather than left waiting."""
        self._free_frames.set_stuck(why)

    async def _look_on(self) -> None:
        shrinking = False
        while True:
            self._kicked = trio.Event()
            self._kick_pending = False
            self._short.set()  # a notice that came while another one was pending was for the reserve, too
            if self._tmem.arena.has_releasing or self._tmem.arena.takes_cold or self._holes.is_due:
                await self._background.write.run(self._tidy)
            self._cleaner.look()
            marks = self.marks.under(self.ceiling)
            goal = background_goal(self._tmem.pool_bytes, marks, shrinking) if self._tier.capacity_bytes else 0
            if self._free_frames.stuck or not await self._gets_room():
                goal = max(goal, SEGMENT_BYTES)
            shrinking = goal > 0 and await self._step(goal)
            if self._free_frames.stuck:
                await trio.sleep(RETRY_S)
            elif not shrinking:
                with trio.move_on_after(self._holes.wait_s):
                    await self._kicked.wait()

    async def _gets_room(self) -> bool:
        """Whether there is a frame for the next segment, or the system gives one soon."""
        arena = self._tmem.arena
        self._wants_frame = True
        with trio.move_on_after(self.frame_s if self._tier.capacity_bytes else math.inf):
            while True:
                self._framed = trio.Event()  # not `_kicked`: what else a notice was for is still to be looked at
                self._kick_pending = False  # before the look: a notice after it kicks again, one before it is seen by it
                if arena.has_free_frame or not arena.is_growing:
                    break
                await self._framed.wait()
        self._wants_frame = False
        return arena.has_free_frame

    async def _fill_reserve_on(self) -> None:
        """Keep the reserve filled. The system may have no memory for it, for as long as it likes: nobody waits for that."""
        while True:
            self._short = trio.Event()
            if self._tmem.arena.wants_populating:
                await self._grower.run(self._fill_reserve)
            await self._short.wait()

    async def shrink(self, request: ShrinkRequest) -> ShrinkAnswer:
        """Free what is asked for, sealing the open segments if that takes it; returns when it is done or cannot go on.

        Ends after the segments under way when it is cancelled: then `last` says how far it came.
        """
        tally = _Tally(request, include_open=True, is_request=True)

        async def work() -> ShrinkAnswer:
            answer = await self._free(tally, self._requested)
            await self._requested.write.run(partial(self._tidy, again=True))
            self.counts.shrinks += 1
            self.counts.shrinks_short += answer.reason is not None
            self.last = answer
            return answer

        async with self._one_request:  # its threads do one after the other: who waits for them can still be interrupted here
            return await finish(work, lambda: tally.stop(INTERRUPTED))

    def look_again(self) -> None:
        """Limits have changed: see what there is to do."""
        self._notice()

    async def _step(self, goal: int) -> bool:
        """Free up to `goal` bytes in the background; whether to go on at once."""
        include_open = not self._tmem.arena.has_free_frame
        answer = await self._free(_Tally(ShrinkRequest(goal), include_open), self._background)
        return answer.written > 0 and self._free_frames.stuck is None

    async def _free(self, tally: _Tally, pair: _Pair) -> ShrinkAnswer:
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):  # both or none: the second thread waits for the first
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pair.write.run, partial(self._write_back_while, tally))
                nursery.start_soon(pair.release.run, partial(self._release_while, tally))
        self._say_whether_stuck(tally)
        return tally.answer()

    def _say_whether_stuck(self, tally: _Tally) -> None:
        """A shrink that met the tier knows whether room can be made; one that did not, knows only that none is needed."""
        if tally.stuck is None and not tally.written and self._tmem.has_victims:
            return
        if tally.stuck != self._free_frames.stuck:
            log.warning("no room can be made: %s", tally.stuck) if tally.stuck else log.info("room can be made again")
            self._free_frames.set_stuck(tally.stuck)

    def _wake(self) -> None:
        self._kicked.set()
        self._framed.set()
        self._short.set()
        self.moved()

    def _write_back_while(self, tally: _Tally) -> None:
        """Write segments back as long as `tally` wants more; in a thread."""
        try:
            while tally.claim() and self._write_back_one(tally):
                tally.written_back.release()
        except TierError as error:
            tally.stop(str(error), stuck=True)
        finally:
            tally.is_over = True
            tally.written_back.release()

    def _write_back_one(self, tally: _Tally) -> bool:
        """One step: write a segment back, or merge sparse ones first, or make room on a full tier. Raises TierError."""
        try:
            plan = self._plan_write_back(tally)
            if plan is None:
                return self._await_others(tally)
            if isinstance(plan, WriteBack):
                self._write_back(plan, tally)
            else:
                tally.done(0, 0, self._cleaner.merge_in_ram(plan) * SEGMENT_BYTES)
        except BackingFull:
            frames = self._cleaner.make_room()
            if frames is None:
                raise
            tally.done(0, 0, frames * SEGMENT_BYTES)
            self._holes.punch()
        return True

    def _plan_write_back(self, tally: _Tally) -> WriteBack | Merge | None:
        """The store's plan, made again without what is dead on the tier if that leaves no extent. Raises BackingFull."""
        try:
            return self._tmem.plan_write_back(tally.include_open)
        except BackingFull:
            self._holes.punch()
            return self._tmem.plan_write_back(tally.include_open)

    def _await_others(self, tally: _Tally) -> bool:
        """There is no victim. Wait for what a merge or another shrink holds; whether there is more to do then.

        The background does not wait: what it is to free is counted by what the pool holds, and it is woken when that changes.
        """
        if not tally.is_request or not self._tmem.is_held_elsewhere:
            tally.give_back_claim()
            tally.stop(_EMPTY)
            return False
        while self._tmem.is_held_elsewhere and not self._tmem.has_victims and not tally.is_to_end:
            time.sleep(_OTHERS_S)
        tally.give_back_claim()
        return True

    def _release_while(self, tally: _Tally) -> None:
        """Give memory back while segments are written; in a thread."""
        while not tally.is_over:
            tally.written_back.acquire()
            self._release()

    def _write_back(self, plan: WriteBack, tally: _Tally) -> None:
        """Perform `plan`. Raises TierError."""
        try:
            self._tier.write(plan.extent, plan.data)
        except BaseException:
            self._tmem.abort_write_back(plan)
            with self._lock:
                self.counts.write_errors += 1
            raise
        goes = self._tmem.commit_write_back(plan)
        tally.done(len(plan.data), plan.pages, SEGMENT_BYTES if goes else 0)
        with self._lock:
            self.counts.segments += 1
            self.counts.pages += plan.pages
            self.counts.written_bytes += len(plan.data)

    def _release(self) -> None:
        """Give the memory of frames that are not needed back to the system."""
        while plan := self._tmem.reclaim.plan_release():
            try:
                for frame in plan.frames:
                    punch(self._tmem.arena.region.fd, frame * SEGMENT_BYTES, SEGMENT_BYTES)
            except OSError as error:
                self._tmem.reclaim.abort_release(plan)
                log.error("memory could not be given back: %s", error)
                return
            except BaseException:
                self._tmem.reclaim.abort_release(plan)
                raise
            self._tmem.reclaim.commit_release(plan)
            with self._lock:
                self.counts.released_bytes += len(plan.frames) * SEGMENT_BYTES

    def _tidy(self, again: bool = False) -> None:
        """Release frames, punch holes (`again`: also those put off), and fill the reserve, if nobody else does; in a thread."""
        self._release()
        self._holes.punch(again)
        if self._tmem.arena.takes_cold:
            self._fill_reserve()

    def _fill_reserve(self) -> None:
        """Fault frames in for what comes; in a thread."""
        while plan := self._tmem.reclaim.plan_populate():
            try:
                populate(self._tmem.arena.region.map, plan.frame * SEGMENT_BYTES, SEGMENT_BYTES)
            except OSError as error:
                self._tmem.reclaim.commit_populate(plan, ok=False)
                log.warning("no memory for the reserve: %s", error)
                return
            except BaseException:
                self._tmem.reclaim.commit_populate(plan, ok=False)
                raise
            self._tmem.reclaim.commit_populate(plan)
            # the background has to look again if somebody waits for the frame, or if the frame takes the pool above its watermark
            if self._wants_frame or self._tmem.pool_bytes > self.marks.under(self.ceiling).high:
                self._notice()
            else:
                self._free_frames.signal()

    def _notice(self) -> None:
        """The store says that there may be work. Called under its lock, but for what is told from here, from any thread.

        Two threads that both find no kick pending both kick, which does no harm; it is unset in trio's thread alone, before a look.
        """
        self._free_frames.signal()
        if not self._kick_pending:
            self._kick_pending = True
            self._kick()
