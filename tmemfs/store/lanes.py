"""A lane: segments of one kind. Its open segment takes records; its sealed ones wait in RAM, oldest first.

Packed and raw records have lanes of their own, because raw ones gain nothing from staying in RAM. Guarded by the store's lock.

Invariant:
1. `sealed` holds the lane's segments in state SEALED, in the order in which they leave RAM: by age, but one that could
   not be written is in front again.
"""

from __future__ import annotations

from collections import OrderedDict

from tmemfs.store.frames import Frame
from tmemfs.store.record import SegmentId, segment_seed
from tmemfs.units import SEGMENT_BYTES


class Lane:
    """Lane `index`. While no segment is open, `fill` is SEGMENT_BYTES, so that nothing fits.

    `base` is the arena offset of the open segment's frame, `seed` what its sequence adds to its records' checksums.
    """

    __slots__ = ("base", "fill", "index", "is_open", "sealed", "seed", "segment")

    def __init__(self, index: int) -> None:
        self.index = index
        self.sealed: OrderedDict[SegmentId, None] = OrderedDict()
        self.close()

    def start(self, segment: SegmentId, frame: Frame, sequence: int) -> None:
        """Append to `segment` in `frame` from now on."""
        self.is_open = True
        self.segment = segment
        self.base = frame * SEGMENT_BYTES
        self.fill = 0
        self.seed = segment_seed(sequence)

    def advance(self, fill: int) -> None:
        """Records were appended to the open segment, up to `fill`."""
        self.fill = fill

    def close(self) -> None:
        """No segment is open."""
        self.is_open = False
        self.segment = SegmentId(0)
        self.base = 0
        # So the next record does not fit, and has a segment opened: append need not ask whether one is.
        self.fill = SEGMENT_BYTES
        self.seed = 0

    def append(self, segment: SegmentId) -> None:
        """`segment` was sealed: it is the last in line."""
        self.sealed[segment] = None

    def to_front(self, segment: SegmentId) -> None:
        """`segment` is next in line."""
        # It was in front before it was taken, so the order of age is kept.
        self.sealed[segment] = None
        self.sealed.move_to_end(segment, last=False)

    def remove(self, segment: SegmentId) -> None:
        """`segment` is not in line any more."""
        del self.sealed[segment]

    @property
    def oldest(self) -> SegmentId | None:
        """The sealed segment next in line."""
        return next(iter(self.sealed), None)
