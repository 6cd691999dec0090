"""Extents: which parts of the tier are free.

An extent is in one of four conditions:

    free      it holds nothing
    out       it holds a segment, or one is being written to it
    retired   what it held is not needed any more; its hole is still to be punched
    stale     retired, and its hole could not be punched, or was not before a crash: the next segment is written over it

What is not free takes the whole blocks of its fill. What is out or retired takes at most `limit_bytes`, and at most `count`
extents. Stale extents are taken before free ones. So they never keep a segment away, and the disk they take does not grow. The last
`reserve_bytes` of both limits are for cleaning alone, so that it makes progress on a tier that is full.

On a tier that cannot discard, a retired extent is free at once.

Guarded by the store's lock. Does no I/O: the holes are punched between `take_retired` and `discarded`.

Invariants:
1. Each extent is in exactly one of the four conditions.
2. held_bytes = out + retired + stale; retired_bytes = retired + stale.
"""

from __future__ import annotations

import heapq
from array import array
from itertools import islice
from typing import Final

from tmemfs.tiers.tier import Extent
from tmemfs.units import SEGMENT_BYTES

#: Tier that only cleaning may use: one segment being written, and one whose sources' holes are still to be punched.
CLEANING_RESERVE_BYTES: Final = 2 * SEGMENT_BYTES


class Extents:
    """`count` extents of one segment each. The lowest free one is taken first, so that the backing stays short."""

    def __init__(self, count: int, limit_bytes: int | None = None, reserve_bytes: int = 0) -> None:
        self.reserve_bytes = reserve_bytes
        self.count_bytes = count * SEGMENT_BYTES
        self.limit_bytes = count * SEGMENT_BYTES if limit_bytes is None else limit_bytes
        self.held_bytes = 0
        #: Of `held_bytes`, those whose holes are still to be punched.
        self.retired_bytes = 0
        self.out: dict[Extent, int] = {}
        self._are_punched = True
        self._retired: dict[Extent, int] = {}
        self._stale: dict[Extent, int] = {}
        self._stale_bytes = 0
        self._discarding: dict[Extent, int] = {}
        self._free: list[Extent] = []
        self._untouched = 0
        self._touched = memoryview(array("Q", [0]))

    @property
    def has_retired(self) -> bool:
        """Whether holes are to be punched now."""
        return bool(self._retired)

    @property
    def has_stale(self) -> bool:
        """Whether there are holes that could not be punched."""
        return bool(self._stale)

    @property
    def free_bytes(self) -> int:
        """What segments may still take, before the cleaner's reserve."""
        return min(self.limit_bytes - self._needed_bytes, self.count_bytes - self._taken * SEGMENT_BYTES) - self.reserve_bytes

    @property
    def _needed_bytes(self) -> int:
        return self.held_bytes - self._stale_bytes

    @property
    def _taken(self) -> int:
        """Extents that are out or retired."""
        return self._untouched - len(self._free) - len(self._stale)

    def set_limit(self, limit_bytes: int) -> None:
        """At most `limit_bytes` out from now on; those above it are not taken back."""
        self.limit_bytes = limit_bytes

    def take(self, size_bytes: int, for_cleaning: bool = False) -> Extent | None:
        """A stale extent or the lowest free one for `size_bytes`; None at the limit, which is nearer for what is not cleaning."""
        reserve = 0 if for_cleaning else self.reserve_bytes
        # Two limits: bytes of disk, and extents, of which each takes a segment's worth of the address space of the tier.
        if (
            self._needed_bytes + size_bytes + reserve > self.limit_bytes
            or self._taken * SEGMENT_BYTES + reserve >= self.count_bytes
        ):
            return None
        # A stale one takes its blocks already, so the disk in use grows least. Else the lowest, so that the backing stays short.
        if self._stale:
            extent = next(iter(self._stale))
            self._unstale(extent)
        elif self._free:
            extent = heapq.heappop(self._free)
        else:
            extent = Extent(self._untouched)
            self._untouched += 1
            # Before anything is written there: a process that starts after a crash has to know where something may lie.
            self._touched[0] = self._untouched
        self.out[extent] = size_bytes
        self.held_bytes += size_bytes
        return extent

    def resize(self, extent: Extent, size_bytes: int) -> None:
        """`extent` turned out to need only `size_bytes`."""
        self.held_bytes -= self.out[extent] - size_bytes
        self.out[extent] = size_bytes

    def adopt(self, extents: dict[Extent, int], touched: memoryview) -> None:
        """Count `extents`, with their bytes, as out: segments in the table lie there. The others below `touched` are stale.

        `touched` is a word that outlives this process, and is kept up to date: extents from its value on were never taken.
        """
        self.out = dict(extents)
        self.held_bytes = sum(extents.values())
        self._touched = touched
        self._untouched = touched[0] = max(touched[0], max(extents, default=-1) + 1)
        # A write-back or cleaning that was killed may have written there, and a hole may not have been punched. Of most of them
        # it was: so none is counted as disk in use, which could refuse a write.
        self._stale = {Extent(index): 0 for index in range(self._untouched) if index not in extents}

    def retire(self, extent: Extent) -> None:
        """Nothing in `extent` is needed any more: queue its hole, or free it where there are no holes."""
        size_bytes = self.out.pop(extent)
        self.retired_bytes += size_bytes
        if self._are_punched:
            self._retired[extent] = size_bytes
        else:
            self._free_one(extent, size_bytes)

    def take_retired(self, most: int) -> tuple[Extent, ...]:
        """Up to `most` extents whose holes are to be punched now, the first retired ones, in order of place."""
        # The longest retired ones, so that none waits for ever. In order of place: the tier punches one hole per run of neighbours.
        taken = tuple(sorted(islice(self._retired, most)))
        for extent in taken:
            self._discarding[extent] = self._retired.pop(extent)
        return taken

    def discarded(self, extents: tuple[Extent, ...], ok: bool) -> None:
        """The holes of `extents` are punched, or could not be: then they are stale."""
        for extent in extents:
            size_bytes = self._discarding.pop(extent)
            if ok or not self._are_punched:
                self._free_one(extent, size_bytes)
            else:
                # It takes its blocks still, so it counts as held until it is punched or written over.
                self._stale[extent] = size_bytes
                self._stale_bytes += size_bytes

    def punch_again(self) -> None:
        """Queue the holes of stale extents."""
        self._retired.update(self._stale)
        self._stale.clear()
        self._stale_bytes = 0

    def punch_none(self) -> None:
        """The tier cannot discard: what is retired or stale is free, and what is retired from now on is so at once."""
        self._are_punched = False
        self.punch_again()
        while self._retired:
            self._free_one(*self._retired.popitem())

    def _free_one(self, extent: Extent, size_bytes: int) -> None:
        self.held_bytes -= size_bytes
        self.retired_bytes -= size_bytes
        heapq.heappush(self._free, extent)

    def _unstale(self, extent: Extent) -> None:
        """A segment is written over `extent`."""
        size_bytes = self._stale.pop(extent)
        self._stale_bytes -= size_bytes
        self.held_bytes -= size_bytes
        self.retired_bytes -= size_bytes
