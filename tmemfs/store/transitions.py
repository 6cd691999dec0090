"""The transitions of a segment, each with all that depends on it: its lane, its frame or extent, the ledger, the notice.

The segment table (segments.py) says which transitions are legal. This module makes them in the order that a crash and a load
need: first the segment's place, in one 8-byte write, then what becomes free by it. So a frame or an extent that is given back is
always one that nothing refers to, in this process and in the regions.

Guarded by the store's lock: callers hold it.

Invariants:
1. A segment is in line of its lane, and filed in the ledger's index, while it is sealed, and neither while it is written or merged.
2. A frame is given back only after its segment lies on the tier or is empty; an extent is retired only after its segment is free.
3. `clean` holds the segments in state CLEAN, in the order in which they leave RAM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tmemfs.store.clean_copies import CleanCopies
from tmemfs.store.extents import Extents
from tmemfs.store.frames import Arena, Frame
from tmemfs.store.lanes import Lane
from tmemfs.store.ledger import EMPTIED, Ledger
from tmemfs.store.record import SegmentId, handle_segment
from tmemfs.store.segments import CLEAN, FREE, LANE_PACKED, LANE_RAW, MERGING, ON_TIER, SEALED, SegmentTable
from tmemfs.tiers.tier import Extent

#: Called with whether a frame may have become free.
Notice = Callable[[bool], None]


class Transitions:
    """Moves segments of `segments` between `arena` and `extents`.

    `notice` is called when there may be work for others, with whether a frame may have become free. It must return at once.
    """

    def __init__(self, segments: SegmentTable, ledger: Ledger, arena: Arena, extents: Extents, notice: Notice) -> None:
        self.segments: Final = segments
        self.ledger: Final = ledger
        self.arena: Final = arena
        self.extents: Final = extents
        self.notice: Final = notice
        self.lanes: Final = (Lane(LANE_PACKED), Lane(LANE_RAW))
        self.clean: Final = CleanCopies(segments)

    def open_next(self, lane: Lane) -> bool:
        """Seal the lane's segment and open another; False, and the lane as it was, if there is no frame."""
        # Asked before anything changes: a lane that was sealed in vain would leave a segment half empty.
        if not self.arena.has_free_frame and not self._free_clean_frame():
            # Work for the shrinker, but no frame: the store that waits and finds none must not wake itself to try again at once.
            self.notice(False)
            return False
        # Sealed first. If nothing of the segment is live, that frees its frame for the next.
        self.seal(lane)
        frame = self.arena.take()
        assert frame is not None
        segment = self.segments.take()
        lane.start(segment, frame, self.segments.open(segment, lane.index, frame))
        self.notice(True)
        return True

    def _free_clean_frame(self) -> bool:
        """Drop a clean copy for the frame; whether there is one then. Nothing is written for it, so no store has to wait."""
        # Not while a frame is on its way: what is in RAM is worth the wait. Above the limit, a frame given back is not taken.
        can_take = not self.arena.is_growing and self.arena.held <= self.arena.limit
        if can_take and (segment := self.clean.next_victim()) is not None:
            self.drop_copy(segment)
        return self.arena.has_free_frame

    def seal(self, lane: Lane) -> None:
        """Close the lane's segment, if it has one; its records become a candidate for write-back."""
        if lane.is_open:
            segment = lane.segment
            # Closed first: `emptied` below frees the frame, which the lane must not append to any more.
            lane.close()
            self.segments.move(segment, SEALED, self.segments.frame(segment))
            self.queue(segment)
            if not self.ledger.live[segment]:
                self.emptied(segment)

    def dropped(self, handle: int, outcome: int) -> None:
        """The ledger's `drop` of `handle` had an `outcome` other than NOTHING."""
        if outcome == EMPTIED:
            self.emptied(handle_segment(handle))
        else:
            self.notice(False)

    def drop(self, handle: int) -> None:
        """A slot does not refer to the record of `handle` any more."""
        if outcome := self.ledger.drop(handle):
            self.dropped(handle, outcome)

    def emptied(self, segment: SegmentId) -> None:
        """No slot refers to `segment`: free it, unless it is open, being written or pinned (then that frees it later)."""
        state = self.segments.state(segment)
        if state == SEALED:
            self.withdraw(segment)
            self.free_in_ram(segment, self.segments.frame(segment))
            self.notice(True)
        elif state == ON_TIER:
            # No victim any more, also while a reader keeps it: there is nothing to clean in it.
            self.ledger.withdraw(segment)
            if segment not in self.segments.pins:
                self._free_on_tier(segment)
        elif state == CLEAN:
            self.clean.remove(segment, 0)
            frame, extent = self.segments.frame(segment), self.segments.extent(segment)
            self.free_in_ram(segment, frame)
            self.extents.retire(extent)
            self.notice(True)

    def queue(self, segment: SegmentId) -> None:
        """`segment` is sealed, in RAM, and the last in line of its lane."""
        self.lane_of(segment).append(segment)
        self.ledger.file(segment)

    def keep_in_ram(self, segment: SegmentId, frame: Frame) -> None:
        """What was to be written or merged stays in `frame`: it is sealed, and the next in line of its lane."""
        self.segments.move(segment, SEALED, frame)
        self.lane_of(segment).to_front(segment)
        self.ledger.file(segment)

    def withdraw(self, segment: SegmentId) -> None:
        """`segment`, which is sealed, leaves the line of its lane: it is to be written, merged or freed."""
        self.lane_of(segment).remove(segment)
        self.ledger.withdraw(segment)

    def keep_copy(self, segment: SegmentId, frame: Frame, extent: Extent) -> None:
        """`segment`, which was written to `extent`, stays in `frame`, too."""
        self.segments.keep_clean(segment, frame, extent)
        self.clean.append(segment, self.ledger.live[segment])

    def drop_copy(self, segment: SegmentId) -> bool:
        """`segment`, which is clean, leaves RAM; whether its frame's memory is released to the system."""
        self.clean.remove(segment, self.ledger.live[segment])
        self.clean.dropped += 1
        frame = self.segments.frame(segment)
        self.segments.move(segment, ON_TIER, self.segments.extent(segment))
        self.ledger.written_back(segment)
        return self.arena.give_back(frame)

    def begin_merge(self, segment: SegmentId) -> None:
        """The records of `segment`, which is sealed, are being copied."""
        self.withdraw(segment)
        self.segments.move(segment, MERGING, self.segments.frame(segment))

    def free_in_ram(self, segment: SegmentId, frame: Frame) -> bool:
        """Nothing of `segment`, which is in no line, is live; whether its frame's memory is released to the system."""
        # The place first: no segment may refer to a frame that another one is given.
        self.segments.move(segment, FREE, 0)
        return self.arena.give_back(frame)

    def _free_on_tier(self, segment: SegmentId) -> None:
        extent = self.segments.extent(segment)
        # The place first: after a crash between the two, the extent is free, as nothing refers to it.
        self.segments.move(segment, FREE, 0)
        self.extents.retire(extent)
        self.notice(True)

    def unpin(self, segment: SegmentId) -> bool:
        """Undo one pin, and free `segment` if it became empty meanwhile; whether it was the last pin."""
        # `emptied` found it pinned and left it. Nobody else looks at it again.
        is_last = self.segments.unpin(segment)
        if is_last and not self.ledger.live[segment]:
            self.emptied(segment)
        return is_last

    def lane_of(self, segment: SegmentId) -> Lane:
        """The lane of a segment in RAM."""
        return self.lanes[self.segments.lane(segment)]
