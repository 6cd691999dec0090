"""Clean copies: segments that lie on the tier and in RAM. The frame of each can be had without any I/O.

They are dropped in the order in which they were written, with a second chance for those that were loaded from. A segment comes here
when it was written ahead of need, and leaves when its frame is wanted, or when the last of its pages is dropped.

Guarded by the store's lock.
"""

from __future__ import annotations

from collections import OrderedDict

from tmemfs.policy.victims import next_victim
from tmemfs.store.record import SegmentId, whole_blocks
from tmemfs.store.segments import SegmentTable


class CleanCopies:
    """Those of `segments`. `tier_bytes` is what they take of the tier."""

    def __init__(self, segments: SegmentTable) -> None:
        self._segments = segments
        #: With the bytes of each that were live when it came.
        self._line: OrderedDict[SegmentId, int] = OrderedDict()
        self.tier_bytes = 0
        #: Since the start: copies dropped for their frames, and bytes that need not have been written, as they died here.
        self.dropped = 0
        self.died_bytes = 0

    def __len__(self) -> int:
        return len(self._line)

    def __contains__(self, segment: SegmentId) -> bool:
        return segment in self._line

    def append(self, segment: SegmentId, live_bytes: int) -> None:
        """`segment`, of which `live_bytes` are live, is clean, and the last to be dropped."""
        self._line[segment] = live_bytes
        self.tier_bytes += whole_blocks(self._segments.fill(segment))

    def remove(self, segment: SegmentId, live_bytes: int) -> None:
        """`segment`, of which `live_bytes` are left, is not clean any more."""
        self.died_bytes += self._line.pop(segment) - live_bytes
        self.tier_bytes -= whole_blocks(self._segments.fill(segment))

    def next_victim(self) -> SegmentId | None:
        """The next to be dropped; those passed over for it have had their second chance. None: there is none."""
        loaded = self._segments.loaded
        victim, passed = next_victim((segment, bool(loaded[segment])) for segment in self._line)
        for segment in passed:
            loaded[segment] = 0
            self._line.move_to_end(segment)
        return victim
