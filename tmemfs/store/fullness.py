"""Fullness: segments on the tier, by the share of them that is still live.

LEVELS lists, each in order of arrival, so that a cleaner finds its victims by looking at one segment a level, however many there
are; a dropped record moves its segment only when that falls to a lower level. Derived from slots and segments; guarded by the
store's lock.

Invariant: 1. `live[s] >= floor[s]` for every segment s that is filed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import islice
from typing import Final

from tmemfs.store.record import SegmentId

LEVELS: Final = 64
_PER_LEVEL: Final = 4


class Fullness:
    """At most `count` segments, by live share."""

    def __init__(self, count: int) -> None:
        #: Live bytes below which `refile` is due; 0 for a segment that is not filed.
        self.floor = array("l", [0]) * count
        self._level = array("b", [-1]) * count
        self._size = array("l", [0]) * count
        self._levels: tuple[dict[SegmentId, None], ...] = tuple({} for _ in range(LEVELS))

    def add(self, segment: SegmentId, live_bytes: int, size_bytes: int) -> None:
        """File `segment`, of whose `size_bytes` on the tier `live_bytes` live."""
        self._size[segment] = size_bytes
        level = min(live_bytes * LEVELS // size_bytes, LEVELS - 1)
        self._level[segment] = level
        self._levels[level][segment] = None
        self.floor[segment] = level * size_bytes // LEVELS

    def remove(self, segment: SegmentId) -> None:
        """`segment` is no longer one to be cleaned; nothing, if it is not filed."""
        level = self._level[segment]
        if level >= 0:
            del self._levels[level][segment]
            self._level[segment] = -1
            self.floor[segment] = 0

    def refile(self, segment: SegmentId, live_bytes: int) -> None:
        """Fewer than `floor` bytes of `segment` live."""
        self.remove(segment)
        self.add(segment, live_bytes, self._size[segment])

    def histogram(self, bins: int = 8) -> tuple[int, ...]:
        """How many segments have up to 1/bins, 2/bins, ... of their bytes live."""
        each = LEVELS // bins
        return tuple(sum(map(len, self._levels[at : at + each])) for at in range(0, LEVELS, each))

    def candidates(self) -> Iterator[SegmentId]:
        """The segments that have been longest in each level: among them is the best victim, or one as good."""
        for level in self._levels:
            yield from islice(level, _PER_LEVEL)
