"""What runs in a daemon, for those who report on it and steer it, and the limits it keeps.

Invariant: 1. low <= high <= max, and a limit that is shown is one that holds: a lower pool.max is set only once reached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from tmemfs.engine import Engine
from tmemfs.errors import Busy, OutOfRange
from tmemfs.jobs.pressure import Pressure
from tmemfs.jobs.shrinker import ShrinkRequest
from tmemfs.jobs.supervision import Jobs
from tmemfs.policy.watermarks import Watermarks
from tmemfs.store.consistency import TmemStatistics, statistics
from tmemfs.store.frames import KEPT_FRAMES, RESERVE_FRAMES
from tmemfs.units import SEGMENT_BYTES, format_size, parse_size

#: Below this no swap-out can go on while a segment is written back: the reserve, and an open segment a lane and one on its way.
SMALLEST_POOL_BYTES: Final = (KEPT_FRAMES + RESERVE_FRAMES + 4) * SEGMENT_BYTES


def parse_pool_max(text: str, ram_bytes: int) -> int:
    """Bytes of a pool limit, whole frames. Raises BadValue, OutOfRange."""
    limit = parse_size(text, ram_bytes) // SEGMENT_BYTES * SEGMENT_BYTES
    if limit < SMALLEST_POOL_BYTES:
        smallest = format_size(SMALLEST_POOL_BYTES)
        raise OutOfRange(f"a pool limit of {text.strip()} is too small to swap with: give {smallest} or more")
    if limit > ram_bytes:
        raise OutOfRange(f"a pool limit of {text.strip()} is above RAM ({format_size(ram_bytes)}): give N% or max")
    return limit


class Limits:
    """pool.max, pool.high, pool.low and backing.max. Watermarks that were not set follow pool.max."""

    def __init__(self, engine: Engine, ram_bytes: int, backing_bytes: int) -> None:
        self.backing = backing_bytes
        self._tmem = engine.tmem
        self._tier = engine.tier
        self._shrinker = engine.shrinker
        self._size = engine.pool_size
        self._ram_bytes = ram_bytes
        self._one_at_a_time = trio.Lock()
        self._high: int | None = None
        self._low: int | None = None

    @property
    def pool(self) -> Watermarks:
        """The watermarks in force."""
        return self._shrinker.marks

    async def set_pool_max(self, text: str) -> None:
        """Set pool.max; shrinks down to it first, and leaves it as it was where that fails."""
        limit = parse_pool_max(text, self._ram_bytes)
        async with self._one_at_a_time:
            await self._shrink_to(limit, text.strip())

    async def _shrink_to(self, limit: int, text: str) -> None:
        self._size.approach(limit)
        try:
            while (over := self._tmem.pool_bytes - limit) > 0:
                answer = await self._shrinker.shrink(ShrinkRequest(over))
                if self._tmem.pool_bytes > limit and not answer.written:
                    raise Busy(f"the pool cannot shrink to {text} now ({answer.reason}): pool.max stays {self._size.max_bytes}")
        except BaseException:  # also interrupted or cancelled: pyfuse3 or the event loop has failed
            self._size.give_up()
            raise
        self._apply(limit)

    def set_pool_high(self, text: str) -> None:
        """Set pool.high; 'max' lets it follow pool.max again."""
        self._high = self._mark(text)
        self._apply(self.pool.max)

    def set_pool_low(self, text: str) -> None:
        """Set pool.low; 'max' lets it follow pool.max again."""
        low = self._mark(text)
        if low is not None and low > self.pool.high:
            raise OutOfRange(f"pool.low cannot be above pool.high ({self.pool.high}): raise that first")
        self._low = low
        self._apply(self.pool.max)

    def set_backing_max(self, text: str) -> None:
        """Set backing.max; what is on disk above it stays there, and nothing is added."""
        self.backing = parse_size(text, self._tier.capacity_bytes)
        self._tmem.limit_backing(self.backing)
        self._shrinker.look_again()

    def _mark(self, text: str) -> int | None:
        if text.strip().lower() == "max":
            return None
        mark = parse_size(text, self._ram_bytes)
        if not 0 < mark <= self.pool.max:
            raise OutOfRange(f"{text.strip()} is not between 0 and pool.max ({self.pool.max}): raise that first, or write max")
        return mark

    def _apply(self, limit: int) -> None:
        self._shrinker.marks = Watermarks.below(limit, self._high, self._low)
        self._size.set_max(limit)
        self._shrinker.look_again()


@dataclass(slots=True)
class Services:
    """The parts of a running daemon. `outcomes` says what memory safety was had; `datapath` serves the pages."""

    engine: Engine
    limits: Limits
    pressure: Pressure
    jobs: Jobs
    datapath: str
    outcomes: dict[str, int] = field(default_factory=dict)
    is_draining: bool = False
    request_counts: Callable[[], dict[str, int]] = dict

    def statistics(self) -> TmemStatistics:
        """The store's."""
        return statistics(self.engine.tmem)

    def state(self) -> str:
        """running, degraded: WHY, or draining."""
        if self.is_draining:
            return "draining"
        reasons = ([self.engine.free_frames.stuck] if self.engine.free_frames.stuck else []) + self.jobs.degraded()
        if self.engine.tmem.counts.damaged_in_ram:
            reasons.append(f"{self.engine.tmem.counts.damaged_in_ram} loads found a record damaged in RAM: test the memory")
        if self.engine.reader.counts.corrupt:
            reasons.append(f"{self.engine.reader.counts.corrupt} loads found a damaged record: check the backing device")
        if self.engine.reader.counts.failed:
            reasons.append(f"{self.engine.reader.counts.failed} reads from the backing failed: check the backing device")
        return "degraded: " + "; ".join(reasons) if reasons else "running"
