"""The segment table: where each segment lies, and the life of a segment as data.

    free -> open -> sealed -> writing -> on tier -> free
             |         |         |-> clean (in its frame, too) -> on tier, or free
             |         |         |-> sealed (the write failed)
             |         |         '-> free (its last page was dropped)
             |         |-> merging (its records are being copied) -> free, or sealed with what did not fit
             |         '-> free
             '-> free (the target of a merge, of which nothing is live)
    free -> on tier   (cleaned: made of the records of other segments on the tier)

One record of 32 bytes per segment, in a region of its own. Everything else here is derived from it:

    offset  size  field
    0       8     place: bits 0-7 state, 8-15 lane, 16-63 frame (open, sealed, writing, merging) or extent (on tier);
                  clean: 16-39 frame, 40-63 extent
    8       8     fill: bits 0-31 bytes of the segment that hold records, 32-63 number of the dictionary it begins with, or 0
    16      8     sequence: unique for each use of a segment, grows with time
    24      8     age: the sequence of the youngest segment its records were first stored in; its own, unless they were copied

One more word follows the last record: how many extents were ever taken. What a killed process wrote to an extent that no segment
refers to still takes disk; recovery has no other way to know where that may be.

`place` is one word, so a segment moves from RAM to its tier with one 8-byte write. A clean segment lies in both, and leaves RAM
with one such write, without any I/O.

A process that finds 'open', 'writing' or 'merging' after a crash treats it as sealed: the frame is whole.

Guarded by the store's lock.

Invariants:
1. `base[s]` is the arena offset of s's frame while s is in RAM, else -1.
2. A pinned segment is never freed, and its extent not reused.
"""

from __future__ import annotations

from array import array
from typing import Final

from tmemfs.errors import TmemfsError
from tmemfs.store.frames import Frame
from tmemfs.store.record import SegmentId
from tmemfs.store.region import Region
from tmemfs.tiers.tier import Extent
from tmemfs.units import SEGMENT_BYTES

FREE: Final = 0
OPEN: Final = 1
SEALED: Final = 2
WRITING: Final = 3
ON_TIER: Final = 4
MERGING: Final = 5
CLEAN: Final = 6
STATE_NAMES: Final = ("free", "open", "sealed", "writing", "on-tier", "merging", "clean")
IN_RAM: Final = frozenset((OPEN, SEALED, WRITING, MERGING, CLEAN))
TRANSITIONS: Final = frozenset(
    (
        (FREE, OPEN),
        (OPEN, SEALED),
        (SEALED, WRITING),
        (WRITING, SEALED),
        (WRITING, ON_TIER),
        (WRITING, CLEAN),
        (CLEAN, ON_TIER),
        (CLEAN, FREE),
        (SEALED, FREE),
        (WRITING, FREE),
        (ON_TIER, FREE),
        (SEALED, MERGING),
        (MERGING, SEALED),
        (MERGING, FREE),
        (OPEN, FREE),
        (FREE, ON_TIER),
    )
)

LANE_PACKED: Final = 0
LANE_RAW: Final = 1
#: Records that were cleaned; only ever on a tier.
LANE_COLD: Final = 2
LANES: Final = ("packed", "raw", "cold")

_WORDS: Final = 4
PLACE_WORD, FILL_WORD, _SEQUENCE, _AGE = range(4)
STATE_MASK: Final = 0xFF
LANE_SHIFT: Final = 8
_INDEX_SHIFT: Final = 16
#: In the place of a clean segment, the frame has so many bits, and the extent as many.
_HALF_BITS: Final = 24
#: Frames and extents below this number fit there: 16 TiB.
MOST_BOTH: Final = 1 << _HALF_BITS
_DICTIONARY_SHIFT: Final = 32
FILL_MASK: Final = (1 << _DICTIONARY_SHIFT) - 1
_WORD_BYTES: Final = 8
RECORD_BYTES: Final = _WORD_BYTES * _WORDS


def table_bytes(count: int) -> int:
    """Size of the region of `count` segments."""
    return count * RECORD_BYTES + _WORD_BYTES


class SegmentTable:
    """`count` segment records, and what is derived from them."""

    def __init__(self, count: int, region: Region | None = None) -> None:
        self.count = count
        self.region = region or Region("segments", table_bytes(count))
        self.words = self.region.words()
        #: One word that `Extents` writes: those from this number on were never taken.
        self.extents_touched = self.words[count * _WORDS : count * _WORDS + 1]
        if not self.extents_touched:
            raise TmemfsError(f"bug in tmemfs: {self.region.size_bytes} bytes are too few for {count} segments; please report it")
        self.base = array("q", [-1]) * count
        self.loaded = bytearray(count)
        #: Whether its lane is LANE_COLD: what a dropped page asks, for less than the lane itself costs.
        self.is_cold = bytearray(count)
        self.pins: dict[SegmentId, int] = {}
        self.next_sequence = 1
        #: Segments from here on were never used.
        self.touched = 0
        self._free: list[SegmentId] = []

    def state(self, segment: SegmentId) -> int:
        """FREE, OPEN, SEALED, WRITING, ON_TIER, MERGING or CLEAN."""
        return self.words[segment * _WORDS + PLACE_WORD] & STATE_MASK

    def lane(self, segment: SegmentId) -> int:
        """LANE_PACKED, LANE_RAW or LANE_COLD."""
        return self.words[segment * _WORDS + PLACE_WORD] >> LANE_SHIFT & STATE_MASK

    def frame(self, segment: SegmentId) -> Frame:
        """The frame of a segment that is in RAM."""
        place = self.words[segment * _WORDS + PLACE_WORD]
        index = place >> _INDEX_SHIFT
        return Frame(index & MOST_BOTH - 1 if place & STATE_MASK == CLEAN else index)

    def extent(self, segment: SegmentId) -> Extent:
        """The extent of a segment that is clean or on the tier."""
        place = self.words[segment * _WORDS + PLACE_WORD]
        index = place >> _INDEX_SHIFT
        return Extent(index >> _HALF_BITS if place & STATE_MASK == CLEAN else index)

    def fill(self, segment: SegmentId) -> int:
        """Bytes that hold records."""
        return self.words[segment * _WORDS + FILL_WORD] & FILL_MASK

    def dictionary(self, segment: SegmentId) -> int:
        """Number of the dictionary it begins with; 0: none."""
        return self.words[segment * _WORDS + FILL_WORD] >> _DICTIONARY_SHIFT

    def set_fill(self, segment: SegmentId, fill_bytes: int, dictionary: int = 0) -> None:
        """Record that the first `fill_bytes` hold records, the first of them `dictionary`, if that is not 0."""
        self.words[segment * _WORDS + FILL_WORD] = fill_bytes | dictionary << _DICTIONARY_SHIFT

    def sequence(self, segment: SegmentId) -> int:
        """Number of this use of the segment."""
        return self.words[segment * _WORDS + _SEQUENCE]

    def take(self) -> SegmentId:
        """A free segment. There are as many as frames and extents together, so one is always left."""
        if self._free:
            return self._free.pop()
        # Used ones are taken again first, so that scans look at few.
        if self.touched == self.count:
            raise TmemfsError("bug in tmemfs: the segment table is full though a frame was free; please report it")
        self.touched += 1
        return SegmentId(self.touched - 1)

    def give_back(self, segment: SegmentId) -> None:
        """`segment` was taken and not used."""
        self._free.append(segment)

    def age(self, segment: SegmentId) -> int:
        """How old its records are, as a sequence number: smaller is older."""
        return self.words[segment * _WORDS + _AGE]

    def begin(self, segment: SegmentId, age: int | None = None) -> int:
        """Start a use of `segment`, which stays free for now; returns its sequence number. `age` is that of copied records."""
        sequence = self.next_sequence
        self.next_sequence += 1
        at = segment * _WORDS
        self.words[at + FILL_WORD] = 0
        self.words[at + _SEQUENCE] = sequence
        self.words[at + _AGE] = sequence if age is None else age
        return sequence

    def open(self, segment: SegmentId, lane: int, frame: int, age: int | None = None) -> int:
        """Start a use of `segment` in `frame`; returns its sequence number."""
        # The place last: until then the segment is free, and a crash leaves nothing of it.
        sequence = self.begin(segment, age)
        self.move(segment, OPEN, frame, lane)
        self.base[segment] = frame * SEGMENT_BYTES
        self.loaded[segment] = 0
        return sequence

    def move(self, segment: SegmentId, state: int, index: int, lane: int | None = None) -> None:
        """Change state and place with one write. The transition must be legal. See `keep_clean` for CLEAN."""
        at = segment * _WORDS + PLACE_WORD
        old = self.words[at]
        if (old & 0xFF, state) not in TRANSITIONS:
            moved = f"{STATE_NAMES[old & 0xFF]} to {STATE_NAMES[state]}"
            raise TmemfsError(f"bug in tmemfs: segment {segment} cannot change from {moved}; please report it")
        # One 8-byte write: a process killed around it leaves the segment in one place or in the other.
        self.words[at] = state | (old >> 8 & 0xFF if lane is None else lane) << 8 | index << 16
        if lane is not None:
            self.is_cold[segment] = lane == LANE_COLD
        if state not in IN_RAM:
            self.base[segment] = -1
        if state == FREE:
            self._free.append(segment)

    def keep_clean(self, segment: SegmentId, frame: Frame, extent: Extent) -> None:
        """`segment` lies in `extent`, too, and stays in `frame`. Both must be below MOST_BOTH."""
        self.move(segment, CLEAN, frame | extent << _HALF_BITS)

    def pin(self, segment: SegmentId) -> None:
        """Keep `segment` and its extent until as many calls of `unpin`."""
        self.pins[segment] = self.pins.get(segment, 0) + 1

    def unpin(self, segment: SegmentId) -> bool:
        """Undo one `pin`; whether that was the last."""
        left = self.pins[segment] - 1
        if left:
            self.pins[segment] = left
        else:
            del self.pins[segment]
        return not left

    def in_use(self) -> list[SegmentId]:
        """Every segment that is not free, in order of age."""
        used = [SegmentId(s) for s in range(self.touched) if self.state(SegmentId(s)) != FREE]
        return sorted(used, key=self.age)

    def dictionaries(self) -> set[int]:
        """Numbers of the dictionaries that segments in use begin with."""
        return {self.dictionary(segment) for segment in map(SegmentId, range(self.touched)) if self.state(segment) != FREE} - {0}

    def recover(self) -> list[SegmentId]:
        """Rebuild free list, bases and the next sequence from the region; what was open or being written is sealed."""
        # Column by column: a call of `state` for each of the 140,000 segments of 64 GiB takes 0.1 s, in which nobody gets a page.
        end = self.count * _WORDS
        states = [place & STATE_MASK for place in self.words[PLACE_WORD:end:_WORDS].tolist()]
        # A free one keeps the sequence of its last use, which must not be given again: it is part of checksums and versions.
        self.next_sequence = max(self.words[_SEQUENCE:end:_WORDS].tolist(), default=0) + 1
        used = [SegmentId(segment) for segment, state in enumerate(states) if state != FREE]
        for segment in used:
            self._adopt(segment, states[segment])
        self.touched = used[-1] + 1 if used else 0
        self._free = [SegmentId(segment) for segment in reversed(range(self.touched)) if states[segment] == FREE]
        return sorted(used, key=self.age)

    def _adopt(self, segment: SegmentId, state: int) -> None:
        self.is_cold[segment] = self.lane(segment) == LANE_COLD
        if state == ON_TIER:
            return
        if state not in (SEALED, CLEAN):
            # Nobody writes or copies it any more. Its frame is whole: records lie there before the fill says so.
            self.move(segment, SEALED, self.frame(segment))
        self.base[segment] = self.frame(segment) * SEGMENT_BYTES
