"""The occupancy index: segments by the share of them that is live, in groups for the lanes in RAM and for the tier.

Each group has LEVELS lists, each in order of arrival. So a search for victims looks at a few segments per level, however many there
are, and a dropped record moves its segment only when that falls to a lower level. A segment from which nothing can be gained is set
aside: it is no candidate before the next of its records is dropped.

Only the ledger writes it. Guarded by the store's lock.

Invariant: 1. `live[s] >= floor[s]` for every segment s that is filed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import islice
from typing import Final

from tmemfs.store.record import SegmentId

LEVELS: Final = 64
#: Groups: sealed segments in RAM, by the number of their lane, and those on the tier.
PACKED, RAW, TIER = range(3)
_GROUPS: Final = 3
_PER_LEVEL: Final = 4
_ASIDE: Final = _GROUPS * LEVELS


class OccupancyIndex:
    """At most `count` segments, each in one group or none, by live share."""

    def __init__(self, count: int) -> None:
        #: Live bytes below which `refile` is due; 0 for a segment that is not filed.
        self.floor = array("i", [0]) * count
        self._list_of = array("h", [-1]) * count
        self._size = array("i", [0]) * count
        #: By group and level; after them, in the same order, those that are set aside.
        self._lists: tuple[dict[SegmentId, None], ...] = tuple({} for _ in range(2 * _ASIDE))

    def add(self, group: int, segment: SegmentId, live_bytes: int, size_bytes: int) -> None:
        """File `segment`, which takes `size_bytes` of RAM or of the tier, of which `live_bytes` are live."""
        self._size[segment] = size_bytes
        level = min(live_bytes * LEVELS // size_bytes, LEVELS - 1)
        self._list_of[segment] = group * LEVELS + level
        self._lists[group * LEVELS + level][segment] = None
        self.floor[segment] = level * size_bytes // LEVELS

    def set_aside(self, group: int, segment: SegmentId, live_bytes: int, size_bytes: int) -> None:
        """File `segment` as one that is not worth looking at before a record of it is dropped."""
        self.add(group, segment, live_bytes, size_bytes)
        at = self._list_of[segment]
        del self._lists[at][segment]
        self._lists[_ASIDE + at][segment] = None
        self._list_of[segment] = _ASIDE + at
        # The next record that is dropped falls below this, and so has it filed again.
        self.floor[segment] = live_bytes

    def remove(self, segment: SegmentId) -> None:
        """`segment` is no longer one to be merged; nothing, if it is not filed."""
        at = self._list_of[segment]
        if at >= 0:
            del self._lists[at][segment]
            self._list_of[segment] = -1
            self.floor[segment] = 0

    def refile(self, segment: SegmentId, live_bytes: int) -> bool:
        """Fewer than `floor` bytes of `segment` are live; whether that is less than half of it now, for the first time.

        Nothing, if it is not filed: an open segment has fewer live bytes than none while a batch is appended (ledger.py).
        """
        if self._list_of[segment] < 0:
            return False
        # A segment that was set aside is a candidate again: something in it was dropped.
        group, before = divmod(self._list_of[segment] % _ASIDE, LEVELS)
        self.remove(segment)
        self.add(group, segment, live_bytes, self._size[segment])
        return before >= LEVELS // 2 > live_bytes * LEVELS // self._size[segment]

    def histogram(self, *groups: int, bins: int = 8) -> tuple[int, ...]:
        """How many segments of `groups` have up to 1/bins, 2/bins, ... of their bytes live."""
        each = LEVELS // bins
        starts = [aside + group * LEVELS for group in groups for aside in (0, _ASIDE)]
        return tuple(
            sum(len(segments) for start in starts for segments in self._lists[start + at : start + at + each])
            for at in range(0, LEVELS, each)
        )

    def candidates(self, group: int) -> Iterator[SegmentId]:
        """The segments that have been longest in each level: among them is the best victim, or one as good."""
        # Of one level all gain about the same, so age decides, and the first are about the oldest.
        for segments in self._of(group):
            yield from islice(segments, _PER_LEVEL)

    def emptiest(self, group: int, share: float) -> Iterator[SegmentId]:
        """The segments of `group` of which about `share` or less is live, level by level, the emptiest first."""
        for segments in self._of(group)[: int(LEVELS * share) + 1]:
            yield from segments

    def _of(self, group: int) -> tuple[dict[SegmentId, None], ...]:
        return self._lists[group * LEVELS : (group + 1) * LEVELS]
