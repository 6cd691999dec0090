"""The arena: the RAM of the pool, cut into frames of one segment each.

A frame that is not kept (`kept`) is in one of four conditions:

    cold        no memory behind it
    ready       faulted in, and unused
    used        it holds a segment
    releasing   its memory is to be, or is being, released to the system

Frames with memory behind them are *held*. `held` never exceeds `limit`. A few ready frames are kept as a reserve, so that swap-out
makes progress without asking the kernel for memory.

Guarded by the store's lock. Does no I/O: the jobs populate frames between `take_cold` and `populated`, and punch them between
`take_releasing` and `released`.

Invariants:
1. Each frame but the kept ones is in exactly one of the four conditions.
2. held = kept + ready + used + releasing <= limit, unless the limit was lowered below it; then no frame is taken until it is true
   again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NewType

from tmemfs.store.region import Region
from tmemfs.units import SEGMENT_BYTES

Frame = NewType("Frame", int)

#: Faulted-in frames kept for the next segments: one for each lane and as many again for the time a refill takes.
RESERVE_FRAMES: Final = 4
#: The last ready frame is for merges alone. A merge gives back more frames than it takes, so a full pool can still be compacted.
SPARE_FRAMES: Final = 1
#: Buffers for cleaning: one to read segments into, one to write from.
KEPT_FRAMES: Final = 2


class Arena:
    """`frames` frames of SEGMENT_BYTES in one region, of which at most `limit` have memory behind them.

    `reserve` ready ones are kept for stores, the last `spare` of them for merges. The first `kept` frames hold no segments: they
    are buffers for merges.
    """

    def __init__(
        self,
        frames: int,
        limit: int,
        region: Region | None = None,
        reserve: int = RESERVE_FRAMES,
        spare: int = 0,
        kept: int = 0,
    ) -> None:
        self.frames = frames
        self.region = region or Region("arena", frames * SEGMENT_BYTES)
        self.view = self.region.view
        self.reserve = reserve
        self.spare = spare
        self.kept = kept
        #: Whether `take` may give a frame that is still to be faulted in, by the thread that writes to it first.
        self.takes_cold = True
        self.limit = limit
        self.used: set[Frame] = set()
        self.peak = 0
        self._ready: list[Frame] = []
        self._releasing: list[Frame] = []
        self._given_back = 0
        self._populating = 0
        self._cold: list[Frame] = []
        self._untouched = kept

    @property
    def held(self) -> int:
        """Frames with memory behind them."""
        return self.kept + len(self.used) + self.idle

    @property
    def idle(self) -> int:
        """Frames with memory behind them that hold no segment."""
        return len(self._ready) + len(self._releasing) + self._given_back + self._populating

    @property
    def has_free_frame(self) -> bool:
        """Whether `take` would give a frame."""
        if len(self._ready) > self.spare:
            return True
        held = self.held
        # A frame that waits to be released has its memory still: to use it again costs nothing. Not above the limit.
        if self._releasing and held <= self.limit:
            return True
        return self.takes_cold and held + self._missing_spare < self.limit and self._has_cold

    @property
    def has_releasing(self) -> bool:
        """Whether frames wait for their memory to be released."""
        return bool(self._releasing)

    @property
    def is_growing(self) -> bool:
        """Whether a frame is being faulted in, or is to be."""
        return self._populating > 0 or self.wants_populating

    @property
    def _missing_spare(self) -> int:
        return max(self.spare - len(self._ready) - self._populating, 0)

    @property
    def wants_populating(self) -> bool:
        """Whether the reserve of ready frames is short and there is memory to fill it."""
        return len(self._ready) + self._populating < self.reserve and self.held < self.limit and self._has_cold

    @property
    def _has_cold(self) -> bool:
        return bool(self._cold) or self._untouched < self.frames

    def set_limit(self, limit: int) -> None:
        """At most `limit` frames held from now on, or all there are; the caller has to shrink what is above."""
        self.limit = min(limit, self.frames)

    def adopt(self, frames: set[Frame]) -> None:
        """Count `frames` as used by segments that were found in the table."""
        self.used = set(frames)
        self._untouched = max(max(frames, default=-1) + 1, self.kept)
        self._cold = [Frame(index) for index in range(self.kept, self._untouched) if index not in frames]
        self.peak = self.held

    @property
    def known(self) -> set[Frame]:
        """Frames that are counted as having memory behind them, but for those that are just being released or faulted in."""
        return {*map(Frame, range(self.kept)), *self.used, *self._ready, *self._releasing}

    def adopt_resident(self, resident: Mapping[Frame, int]) -> None:
        """Count frames that an earlier process left with memory behind them and no segment in them; `resident` has their bytes."""
        # Recovery has given back the frames of segments that were empty: to give one back twice would give it to two segments.
        known = self.known
        resident = {frame: size_bytes for frame, size_bytes in resident.items() if frame not in known}
        self._cold += [Frame(index) for index in range(self._untouched, max(resident, default=-1) + 1)]
        self._untouched = max(self._untouched, max(resident, default=-1) + 1)
        self._cold = [frame for frame in self._cold if frame not in resident]
        # Whole ones first, as they may become ready. One that a populate or a release was killed in is never ready, and is
        # released before those that a store could still take as they are.
        for frame in sorted(resident, key=lambda frame: (resident[frame] < SEGMENT_BYTES, resident[frame])):
            if resident[frame] == SEGMENT_BYTES:
                self.give_back(frame)
            else:
                self._releasing.insert(0, frame)
        self.peak = self.held

    def take(self) -> Frame | None:
        """A frame for a segment, one that is faulted in if there is one; None at the limit."""
        if len(self._ready) > self.spare:
            frame = self._ready.pop()
        elif self._releasing and self.held <= self.limit:
            frame = self._releasing.pop()
        elif self.takes_cold and self.held + self._missing_spare < self.limit and self._has_cold:
            frame = self._pop_cold()
        else:
            return None
        self.used.add(frame)
        self.peak = max(self.peak, self.held)
        return frame

    def take_spare(self) -> Frame | None:
        """A frame to merge segments in: a ready one, the last one too, or what `take` returns."""
        # The last one, too: it is kept for this, and a merge gives back more frames than it takes.
        if self._ready:
            frame = self._ready.pop()
            self.used.add(frame)
            return frame
        return self.take()

    def give_back(self, frame: Frame) -> bool:
        """A segment no longer needs `frame`: queue it for release (True), or keep it ready if the reserve is short."""
        self.used.discard(frame)
        # Kept ready rather than released and faulted in again at once.
        short = len(self._ready) + self._populating < self.reserve and self.held < self.limit
        (self._ready if short else self._releasing).append(frame)
        return not short

    def shed_ready(self) -> int:
        """Queue ready frames for release while more is held than the limit allows; how many."""
        # What is being released is above the limit only for a moment.
        over = self.held - len(self._releasing) - self._given_back - self.limit
        shed = min(max(over, 0), len(self._ready))
        for _ in range(shed):
            self._releasing.append(self._ready.pop())
        return shed

    def take_releasing(self, most: int) -> tuple[Frame, ...]:
        """Up to `most` frames whose memory is to be released now."""
        taken = tuple(self._releasing[:most])
        del self._releasing[:most]
        self._given_back += len(taken)
        return taken

    def released(self, frames: tuple[Frame, ...]) -> None:
        """The memory of `frames` is released."""
        self._given_back -= len(frames)
        self._cold.extend(frames)

    def keep(self, frames: tuple[Frame, ...]) -> None:
        """The memory of `frames` could not be released: queue them again."""
        self._given_back -= len(frames)
        self._releasing.extend(frames)

    def allow_cold(self, takes_cold: bool) -> None:
        """Whether `take` may give a frame that is still to be faulted in."""
        self.takes_cold = takes_cold

    def take_cold(self) -> Frame:
        """A frame to populate for the reserve; `wants_populating` must hold."""
        # Counted as held already: the kernel takes memory for it from now on.
        self._populating += 1
        self.peak = max(self.peak, self.held)
        return self._pop_cold()

    def populated(self, frame: Frame, ok: bool) -> None:
        """`frame` from `take_cold` has its memory now, or could not have it."""
        self._populating -= 1
        (self._ready if ok else self._cold).append(frame)

    def frame_view(self, frame: Frame, length: int = SEGMENT_BYTES) -> memoryview:
        """The first `length` bytes of `frame`, borrowed."""
        base = frame * SEGMENT_BYTES
        return self.view[base : base + length]

    def buffers(self) -> list[memoryview]:
        """The kept frames, borrowed."""
        return [self.frame_view(Frame(index)) for index in range(self.kept)]

    def _pop_cold(self) -> Frame:
        # Frames that were touched before, so that the arena stays short: page tables are built for as much as is touched.
        if self._cold:
            return self._cold.pop()
        self._untouched += 1
        return Frame(self._untouched - 1)
