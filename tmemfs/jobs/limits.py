"""The limits a user sets: pool.max, pool.high, pool.low and backing.max, as text.

Knows what the texts mean, in which order a limit takes effect, and what to answer where it cannot. What is in force is in
`PoolSize`.
"""

from __future__ import annotations

from typing import Final

import trio

from tmemfs.errors import Busy, OutOfRange
from tmemfs.jobs.pool_size import PoolSize
from tmemfs.jobs.shrink_request import ShrinkRequest
from tmemfs.jobs.shrinker import Shrinker
from tmemfs.policy.watermarks import Watermarks
from tmemfs.store.frames import KEPT_FRAMES, RESERVE_FRAMES
from tmemfs.store.tmem import Tmem
from tmemfs.tiers.tier import Tier
from tmemfs.units import SEGMENT_BYTES, format_size, parse_size

#: Below this no page can be swapped out while a segment is written back: the buffers, the reserve, and four frames for segments:
#: one that is open in each lane, one that is written, and one that is opened next.
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
    """Sets the limits of `size` and of `tmem`'s extents, and has `shrinker` shrink the pool to a lower pool.max first."""

    def __init__(self, tmem: Tmem, tier: Tier, size: PoolSize, shrinker: Shrinker, ram_bytes: int, backing_bytes: int) -> None:
        self._tmem = tmem
        self._tier = tier
        self._size = size
        self._shrinker = shrinker
        self._ram_bytes = ram_bytes
        self._backing_bytes = backing_bytes
        self._one_at_a_time = trio.Lock()

    @property
    def pool(self) -> Watermarks:
        """pool.max, pool.high and pool.low."""
        return self._size.marks

    @property
    def backing(self) -> int:
        """backing.max in bytes."""
        return self._backing_bytes

    async def set_pool_max(self, text: str) -> None:
        """Set pool.max; shrinks down to it first, and leaves it as it was where that fails. Raises BadValue, OutOfRange, Busy."""
        limit = parse_pool_max(text, self._ram_bytes)
        # Two writers at once would each take the other's limit for the one that is approached.
        async with self._one_at_a_time:
            await self._shrink_to(limit, text.strip())

    async def _shrink_to(self, limit: int, text: str) -> None:
        # Approached before it is set: meanwhile stores take no frame above it, and a reader still sees the old limit.
        self._size.approach(limit)
        try:
            while (over := self._tmem.pool_bytes - limit) > 0:
                answer = await self._shrinker.shrink(ShrinkRequest(over))
                if self._tmem.pool_bytes > limit and not answer.written:
                    raise Busy(f"the pool cannot shrink to {text} now ({answer.reason}): pool.max stays {self.pool.max}")
        except BaseException:  # also interrupted or cancelled: pyfuse3 or the event loop has failed
            self._size.give_up()
            raise
        self._size.set_max(limit)

    def set_pool_high(self, text: str) -> None:
        """Set pool.high; 'max' lets it follow pool.max again. Raises BadValue, OutOfRange."""
        self._size.set_high(self._mark(text))

    def set_pool_low(self, text: str) -> None:
        """Set pool.low; 'max' lets it follow pool.max again. Raises BadValue, OutOfRange."""
        low = self._mark(text)
        if low is not None and low > self.pool.high:
            raise OutOfRange(f"pool.low cannot be above pool.high ({self.pool.high}): raise that first")
        self._size.set_low(low)

    def set_backing_max(self, text: str) -> None:
        """Set backing.max; what is on disk above it stays there, and nothing is added. Raises BadValue."""
        self._backing_bytes = parse_size(text, self._tier.capacity_bytes)
        self._tmem.limit_backing(self._backing_bytes)
        self._shrinker.look_again()  # a tier that was full may have space now

    def _mark(self, text: str) -> int | None:
        if text.strip().lower() == "max":
            return None
        mark = parse_size(text, self._ram_bytes)
        if not 0 < mark <= self.pool.max:
            raise OutOfRange(f"{text.strip()} is not between 0 and pool.max ({self.pool.max}): raise that first, or write max")
        return mark
