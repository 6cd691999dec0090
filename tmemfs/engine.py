"""The engine: a store, its tier, and what works between the two, put together from the bottom up.

Each part gets what it needs in its constructor. What two parts need of each other is made before both: `FreeFrames` is where stores
wait for the shrinker, `Notices` how the store wakes the jobs, `PoolSize` what both the controller and the shrinker go by.

Knows nothing of FUSE, control files and the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tmemfs.jobs.cleaner import Cleaner
from tmemfs.jobs.executor import Executor
from tmemfs.jobs.full_tier import FullTier
from tmemfs.jobs.holes import Holes
from tmemfs.jobs.left_frames import adopt_left_frames
from tmemfs.jobs.merger import Merger
from tmemfs.jobs.notices import Notices
from tmemfs.jobs.pool_size import PoolSize
from tmemfs.jobs.recompressor import Recompressor
from tmemfs.jobs.reserve import Keep, Reserve
from tmemfs.jobs.shrinker import Shrinker
from tmemfs.jobs.supervision import Job
from tmemfs.jobs.throttle import Throttle
from tmemfs.jobs.write_ahead import WriteAhead
from tmemfs.pages.free_frames import FreeFrames
from tmemfs.pages.pager import Pager
from tmemfs.pages.reader import Reader
from tmemfs.store.codec import Codec
from tmemfs.store.tmem import Tmem
from tmemfs.store.transitions import Notice
from tmemfs.tiers.tier import Tier

MakePager = Callable[[Tmem, Reader, FreeFrames, Codec], Pager]


class MakeTmem(Protocol):
    """Makes the store; `notice` is what it calls when there may be work for the jobs."""

    def __call__(self, *, notice: Notice) -> Tmem: ...


@dataclass(frozen=True, slots=True)
class Engine:
    """The parts. `jobs` are the caller's to run, between `start` and `close`."""

    tmem: Tmem
    tier: Tier
    holes: Holes
    free_frames: FreeFrames
    notices: Notices
    pool_size: PoolSize
    reader: Reader
    pager: Pager
    merger: Merger
    full_tier: FullTier
    cleaner: Cleaner
    reserve: Reserve
    shrinker: Shrinker
    recompressor: Recompressor
    write_ahead: WriteAhead

    @classmethod
    def over(
        cls,
        make_tmem: MakeTmem,
        tier: Tier,
        codec: Codec,
        make_pager: MakePager = Pager,
        keep: Keep = lambda offset, length: None,
    ) -> Engine:
        """An engine over the store that `make_tmem` makes. `make_pager` is for those who record what a pager is asked.

        `keep` has what is faulted in stay in RAM though this process ends (jobs/reserve.py).
        """
        free_frames = FreeFrames()
        notices = Notices(free_frames)
        tmem = make_tmem(notice=notices)
        adopt_left_frames(tmem)
        pool_size = PoolSize(tmem, notices)
        reader, holes = Reader(tmem, tier), Holes(tmem, tier)
        pager = make_pager(tmem, reader, free_frames, codec)
        # One throttle for all cleaning: a request that hurries has the background hurry too, which may hold what it waits for.
        throttle, maintenance = Throttle(tmem), Executor("maintenance")
        merger = Merger(tmem, tier, reader, holes, throttle)
        full_tier = FullTier(merger, throttle)
        cleaner = Cleaner(tmem.merges, merger, throttle, notices.cleaner, lambda: pager.refused, maintenance)
        reserve = Reserve(tmem, pool_size, notices, free_frames, keep)
        shrinker = Shrinker(tmem, tier, holes, pool_size, notices, free_frames, reserve, merger, full_tier)
        recompressor = Recompressor(tmem, Throttle(tmem), maintenance)
        write_ahead = WriteAhead(tmem, tier, notices.write_ahead, maintenance, shrinker.count_written)
        return cls(
            tmem,
            tier,
            holes,
            free_frames,
            notices,
            pool_size,
            reader,
            pager,
            merger,
            full_tier,
            cleaner,
            reserve,
            shrinker,
            recompressor,
            write_ahead,
        )

    @property
    def jobs(self) -> tuple[Job, ...]:
        """What goes on in the background."""
        return (
            Job("cleaner", self.cleaner.run),
            Job("shrinker", self.shrinker.run, self.shrinker.failed),
            Job("recompressor", self.recompressor.run),
            Job("write-ahead", self.write_ahead.run),
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
