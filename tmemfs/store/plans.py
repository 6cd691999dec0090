"""Plans: what the store has its callers do outside its lock. Frozen; performed once, then ended.

Each is committed or aborted, except that RecordAt, ReadPlan and Populate have no abort: their commit ends them after an error, too.

WriteBack   write `data` to `extent`, then commit: the segment lies on the tier, and its frame is ready or being released
RecordAt    read one record from the tier, verify it, then commit: its segment is no longer pinned
ReadPlan    the same for all `records` of a request
Merge       copy live records to a new segment, then commit: their handles refer to it (merge_plans.py)
Release     release the memory of `frames` to the system
Discard     punch holes where `extents` were
Populate    fault `frame` in, for the reserve
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tmemfs.store.frames import Frame
from tmemfs.store.record import RECORD_HEADER_BYTES, SegmentId, segment_seed
from tmemfs.tiers.tier import Extent


@dataclass(frozen=True, slots=True)
class WriteBack:
    """Write `data` (borrowed from the frame, whole blocks) to `extent`. `pages` live pages when it was planned.

    `sequence` is that of this use of the segment.
    """

    segment: SegmentId
    sequence: int
    frame: Frame
    extent: Extent
    data: memoryview
    pages: int


class RecordAt(NamedTuple):
    """Where a tier holds the record of `slot`. `at` is its index in the request; `offset` and `length` are bytes.

    `sequence` is that of this use of its segment, `dictionary` the number of the one that the segment begins with, or 0.
    """

    at: int
    slot: int
    segment: SegmentId
    sequence: int
    extent: Extent
    dictionary: int
    offset: int
    tag: int
    length: int

    @property
    def seed(self) -> int:
        """What the segment adds to the checksums of its records."""
        return segment_seed(self.sequence)

    @property
    def end(self) -> int:
        """First byte after the record in its extent."""
        return self.offset + RECORD_HEADER_BYTES + self.length


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Pages of a request in order, None where `records` says where the page lies on a tier; those segments are pinned.

    They end in front of the first page that is damaged in RAM.
    """

    pages: list[bytes | None]
    records: tuple[RecordAt, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """Release the memory of `frames`."""

    frames: tuple[Frame, ...]


@dataclass(frozen=True, slots=True)
class Discard:
    """Punch holes where `extents` were."""

    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Populate:
    """Fault `frame` in."""

    frame: Frame
