"""The engine: the parts that perform the store's plans on one tier, put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tmemfs.jobs.cleaner import Cleaner
from tmemfs.jobs.executor import Executor
from tmemfs.jobs.holes import Holes
from tmemfs.jobs.pool_size import PoolSize
from tmemfs.jobs.recompressor import Recompressor
from tmemfs.jobs.shrinker import Shrinker
from tmemfs.jobs.supervision import Job
from tmemfs.pages.free_frames import FreeFrames
from tmemfs.pages.pager import Pager
from tmemfs.pages.reader import Reader
from tmemfs.policy.watermarks import Watermarks
from tmemfs.store.codec import Codec
from tmemfs.store.tmem import Tmem
from tmemfs.tiers.tier import Tier
from tmemfs.units import SEGMENT_BYTES

MakePager = Callable[[Tmem, Reader, FreeFrames, Codec], Pager]


@dataclass(frozen=True, slots=True)
class Engine:
    """A store, its tier, and what works between the two. `jobs` are the caller's to run."""

    tmem: Tmem
    tier: Tier
    holes: Holes
    free_frames: FreeFrames
    pool_size: PoolSize
    reader: Reader
    pager: Pager
    cleaner: Cleaner
    shrinker: Shrinker
    recompressor: Recompressor

    @classmethod
    def over(cls, tmem: Tmem, tier: Tier, codec: Codec, make_pager: MakePager = Pager) -> Engine:
        """An engine with watermarks below the arena's limit. `make_pager` is for those who record what a pager is asked."""
        free_frames, reader, holes = FreeFrames(), Reader(tmem, tier), Holes(tmem, tier)
        marks = Watermarks.below(tmem.arena.limit * SEGMENT_BYTES)
        pager, cleaner = make_pager(tmem, reader, free_frames, codec), Cleaner(tmem, tier, reader, holes)
        cleaner.refused = lambda: pager.refused
        shrinker = Shrinker(tmem, tier, holes, free_frames, cleaner, marks)
        return cls(
            tmem, tier, holes, free_frames, PoolSize(tmem), reader, pager, cleaner, shrinker, Recompressor(tmem, cleaner.background)
        )

    @property
    def jobs(self) -> tuple[Job, ...]:
        """What goes on in the background."""
        return (
            Job("cleaner", self.cleaner.run),
            Job("shrinker", self.shrinker.run, self.shrinker.failed),
            Job("recompressor", self.recompressor.run),
        )

    def start(self) -> None:
        """Start every thread that a job or a request will need. Raises RuntimeError where the system allows no more threads."""
        for executor in self._executors:
            executor.start()

    def close(self) -> None:
        """End the threads, once they have done what they were asked."""
        for executor in self._executors:
            executor.close()

    @property
    def _executors(self) -> tuple[Executor, ...]:
        return (*self.cleaner.executors, *self.shrinker.executors)
