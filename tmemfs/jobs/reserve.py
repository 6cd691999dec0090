"""The reserve: frames that are faulted in ahead of need, so that a store never asks the kernel for memory.

One thread faults frames in. Only this thread waits for the kernel to find memory, for as long as that takes, and nothing waits for
the thread. The shrinker waits a while for a frame, and then writes segments back instead, one after another until the kernel
gives a frame again.

Invariant: 1. Every plan taken from the store is committed, whatever the kernel answers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Final

import trio

from tmemfs.jobs.executor import Executor
from tmemfs.jobs.notices import Notices
from tmemfs.jobs.pool_size import PoolSize
from tmemfs.pages.free_frames import FreeFrames
from tmemfs.store.tmem import Tmem
from tmemfs.system.memory import populate
from tmemfs.units import SEGMENT_BYTES

log = logging.getLogger(__name__)

#: If the kernel gives no frame for this long, segments are written back instead. While memory is short, that is 25 times what a
#: frame takes. Otherwise a frame comes, and only a busy machine delays it (4 ms, where its host had to find the memory first).
SHORT_FRAME_S: Final = 0.02
FRAME_S: Final = 0.1


#: Keeps a part of the arena in RAM though this process ends: offset and length in bytes. Raises OSError.
Keep = Callable[[int, int], None]


class Reserve:
    """Keeps the reserve of `tmem`'s arena filled. `run` in trio. What is faulted in is given to `keep`."""

    def __init__(self, tmem: Tmem, size: PoolSize, notices: Notices, free_frames: FreeFrames, keep: Keep) -> None:
        self._keep = keep
        self.executor = Executor("populate")
        self._tmem = tmem
        self._size = size
        self._notices = notices
        self._free_frames = free_frames
        self._is_awaited = False
        #: Frames given since the start; of the thread that faults them in.
        self._given = 0
        # in trio's thread: since when no frame has come though one is missing, and `_given` then
        self._missing: tuple[float, int] | None = None

    @property
    def frame_s(self) -> float:
        """How long a frame may take to come."""
        return SHORT_FRAME_S if self._size.is_short else FRAME_S

    async def run(self) -> None:
        """Fill the reserve whenever it is short, until cancelled."""
        await self.executor.run(self.keep_used)
        while True:
            self._notices.reserve.clear()
            if self._tmem.arena.wants_populating:
                await self.executor.run(self.fill)
            await self._notices.reserve.wait()

    async def has_frame_soon(self, wait_s: float) -> bool:
        """Whether there is a frame for the next segment, or the system gives one within `wait_s` seconds.

        These begin when a frame was first missing, and again with each one that is given and taken. So where the system gives none,
        only the first call waits. A pool that grows above its watermark ends the wait: then there is something to write anyway.
        """
        arena = self._tmem.arena
        self._is_awaited = True
        while True:
            self._notices.frame.clear()  # not the shrinker's wakeup: what else a notice was for is still to be looked at
            self._notices.rearm()  # before the look: a notice after it wakes this again, one before it is seen by it
            if arena.has_free_frame or not arena.is_growing:
                self._missing = None
                break
            if self._size.is_above_high and not math.isinf(wait_s):
                break
            with trio.move_on_at(self._missing_since() + wait_s) as late:
                await self._notices.frame.wait()
            if late.cancelled_caught:
                break
        self._is_awaited = False
        return arena.has_free_frame

    def _missing_since(self) -> float:
        """Since when the system has given no frame though one is missing."""
        if self._missing is None or self._missing[1] != self._given:
            self._missing = trio.current_time(), self._given
        return self._missing[0]

    def keep_used(self) -> None:
        """Keep the frames that segments are in: stores took some of them before there was a reserve. In a thread."""
        with self._tmem.lock:
            frames = sorted(self._tmem.arena.used)
        for frame in frames:
            # One that is released meanwhile would be faulted in again, and count nowhere.
            with self._tmem.lock:
                if frame in self._tmem.arena.used:
                    self._keep(frame * SEGMENT_BYTES, SEGMENT_BYTES)

    def fill(self) -> None:
        """Fault frames in until the reserve is full; in a thread."""
        while plan := self._tmem.reclaim.plan_populate():
            try:
                populate(self._tmem.arena.region.map, plan.frame * SEGMENT_BYTES, SEGMENT_BYTES)
                self._keep(plan.frame * SEGMENT_BYTES, SEGMENT_BYTES)
            except OSError as error:
                self._tmem.reclaim.commit_populate(plan, ok=False)
                log.warning("no memory for the reserve: %s", error)
                return
            except BaseException:
                self._tmem.reclaim.commit_populate(plan, ok=False)
                raise
            self._tmem.reclaim.commit_populate(plan)
            self._given += 1
            self._tell()

    def _tell(self) -> None:
        # The background has to look again if it waits for the frame, or if the frame takes the pool above its watermark. Otherwise
        # only stores may wait for it, and trio is not woken for each of the four frames.
        if self._is_awaited or self._size.is_above_high:
            self._notices()
        else:
            self._free_frames.signal()
