"""Merges as data: what is to be copied where, what was copied, and what merges have done so far. See merges.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tmemfs.store.frames import Frame
from tmemfs.store.record import SegmentId, segment_seed, whole_blocks
from tmemfs.tiers.tier import Extent

#: Called between two steps of a merge, so that others get the processor.
Pause = Callable[[], None]
#: Encodes a record again: tag and payload in and out.
Recode = Callable[[int, memoryview], tuple[int, bytes | memoryview]]


def no_pause() -> None:
    """Do not pause."""


@dataclass(frozen=True, slots=True)
class Source:
    """A segment to copy from: `size_bytes` at `extent`, or in RAM as `data` (borrowed). `sequence` is that of this use of it."""

    segment: SegmentId
    sequence: int
    fill: int
    size_bytes: int
    data: memoryview | None
    extent: Extent

    @property
    def seed(self) -> int:
        """What the segment adds to the checksums of its records."""
        return segment_seed(self.sequence)


@dataclass(frozen=True, slots=True)
class Merge:
    """Copy the live records of `sources` into `target`: in RAM at `frame` (then `into` is that), else for `extent`.

    `sequence` is that of the target, `dictionary` the number of the one that it begins with; 0: none.
    """

    sources: tuple[Source, ...]
    target: SegmentId
    sequence: int
    frame: Frame | None
    extent: Extent | None
    into: memoryview | None
    dictionary: int = 0

    @property
    def seed(self) -> int:
        """What the target adds to the checksums of its records."""
        return segment_seed(self.sequence)


@dataclass(slots=True)
class Copied:
    """What was copied so far into `into`: `fill` bytes of records, as (slot, old handle, new handle)."""

    into: memoryview
    fill: int = 0
    moves: list[tuple[int, int, int]] = field(default_factory=list)
    #: Sources of which all live records were copied.
    emptied: list[Source] = field(default_factory=list)
    is_full: bool = False
    damaged: set[SegmentId] = field(default_factory=set)

    @property
    def data(self) -> memoryview:
        """The whole blocks of what was copied."""
        return self.into[: whole_blocks(self.fill)]


@dataclass(slots=True)
class MergeCounts:
    """Since the start. Records moved, and bytes of them, by where they were.

    The copier writes `damaged_records`, merges.py the others.
    """

    compactions: int = 0
    compacted_records: int = 0
    gained_frames: int = 0
    cleanings: int = 0
    cleaned_segments: int = 0
    cleaned_bytes: int = 0
    damaged_records: int = 0
