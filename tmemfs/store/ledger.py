"""The ledger: the only writer of what the store holds.

It counts live bytes and pages per segment, and per pool the pages by tag and the bytes and pages on the tier. It keeps the index of
victims. The part of the store that changes a handle says so here, with `store`, `drop` or `move`. The part that changes the place
of a segment says so with `file`, `withdraw` or `written_back`. The ledger reads places from the segment table and writes nothing
there. It knows neither frames nor extents, and frees nothing: `drop` only says that a segment has become empty.

compiled.pyx has the ledger's compiled half, which the compiled Appender uses. It shares `live`, `pages`, `occupancy.floor` and
`counters`, and does to them what `add` and the plain case of `drop` do. These two modules alone write them.

Every total is kept per pool. There is one pool today, `ONLY_POOL`; a pool is to have its own slots and lanes, so each handle and
each segment belongs to one pool.

Guarded by the store's lock.

Invariants (`consistency.check` compares them with a scan):
1. `live[s]` is the sum of the record bytes of the slots whose handle points into segment s, `pages[s]` their number.
2. The totals of a pool are the sums over its handles.
3. While a batch is being appended, its open segments have less live bytes and pages than 1 says, until `add`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NewType

from tmemfs.store.codec import RAW, TAG_NAMES, ZERO
from tmemfs.store.occupancy import TIER, OccupancyIndex
from tmemfs.store.record import (
    ENCODING_MASK,
    GRAIN_MASK,
    LENGTH_MASK,
    LENGTH_SHIFT,
    RECORD_HEADER_BYTES,
    SEGMENT_SHIFT,
    TAG_MASK,
    TAGS,
    SegmentId,
    handle_accounts,
    handle_record_bytes,
    handle_segment,
    whole_blocks,
)
from tmemfs.store.segments import SegmentTable
from tmemfs.units import SEGMENT_BYTES

_TAGS_OF_PAGES: Final = tuple(TAG_NAMES)

PoolId = NewType("PoolId", int)
ONLY_POOL: Final = PoolId(0)

#: Counters of a pool, one word each: pages by tag at index 0 to TAGS - 1, then these. The last three only ever grow.
COMPRESSED_BYTES: Final = TAGS
LIVE_BYTES: Final = TAGS + 1
TIER_PAGES: Final = TAGS + 2
TIER_LIVE_BYTES: Final = TAGS + 3
COLD_PAGES: Final = TAGS + 4
COLD_RAW_PAGES: Final = TAGS + 5
STORES: Final = TAGS + 6
RAW_STORES: Final = TAGS + 7
STORED_BYTES: Final = TAGS + 8
_COUNTERS: Final = TAGS + 9

#: What `drop` says of the record's segment: nothing to do; less than half of it is live now; nothing of it is live.
NOTHING: Final = 0
SPARSE: Final = 1
EMPTIED: Final = 2


@dataclass(frozen=True, slots=True)
class Totals:
    """What a pool holds now. `cold_raw_pages` are the raw ones of `cold_pages`, which are in segments that were cleaned."""

    pages_by_tag: tuple[int, ...]
    compressed_bytes: int
    live_bytes: int
    tier_pages: int
    tier_live_bytes: int
    cold_pages: int
    cold_raw_pages: int


class Ledger:
    """Counts over `segments`, for `pools` pools. Other modules read `live`, `pages`, `occupancy` and `counters`."""

    def __init__(self, segments: SegmentTable, pools: int = 1) -> None:
        self.live = array("i", [0]) * segments.count
        self.pages = array("i", [0]) * segments.count
        self.occupancy = OccupancyIndex(segments.count)
        self.counters = tuple([0] * _COUNTERS for _ in range(pools))
        self._segments = segments
        # Each page dropped reads these: one attribute less to look up.
        self._base, self._is_cold, self._floor = segments.base, segments.is_cold, self.occupancy.floor

    # ---- handles ---------------------------------------------------------------------------------------------------

    def store(self, handle: int, pool: PoolId = ONLY_POOL) -> None:
        """A slot refers to the record of `handle` now."""
        segment, tag, length, size = handle_accounts(handle)
        counters = self.counters[pool]
        counters[tag] += 1
        if tag == ZERO:
            return
        counters[COMPRESSED_BYTES] += length
        counters[LIVE_BYTES] += size
        self.live[segment] += size
        self.pages[segment] += 1
        if self._base[segment] < 0:
            self._add_on_tier(segment, tag, 1, size, counters)

    def add(
        self, pages: list[int], payload_bytes: int, packed: SegmentId, packed_bytes: int, raw: SegmentId, raw_bytes: int
    ) -> None:
        """Slots refer to `pages` by tag that were appended: raw ones to segment `raw`, others to `packed`. Clears `pages`.

        `packed_bytes` and `raw_bytes` are those of the records. Once per batch: `store` would take 0.5 us of the 2 us per page.
        """
        counters, stored, zero, raw_pages = self.counters[ONLY_POOL], sum(pages), pages[ZERO], pages[RAW]
        for tag in _TAGS_OF_PAGES:
            if pages[tag]:
                counters[tag] += pages[tag]
                pages[tag] = 0
        counters[STORES] += stored
        counters[STORED_BYTES] += payload_bytes
        counters[COMPRESSED_BYTES] += payload_bytes
        counters[LIVE_BYTES] += packed_bytes + raw_bytes
        # Not if nothing was appended: then the lane may have no open segment.
        if packed_bytes:
            self.live[packed] += packed_bytes
            self.pages[packed] += stored - zero - raw_pages
        if raw_pages:
            counters[RAW_STORES] += raw_pages
            self.live[raw] += raw_bytes
            self.pages[raw] += raw_pages

    def drop(self, handle: int, pool: PoolId = ONLY_POOL) -> int:
        """A slot does not refer to the record of `handle` any more; NOTHING, SPARSE or EMPTIED."""
        # The handle is taken apart here: `handle_accounts` would take 0.07 us more per invalidate, of 0.8.
        counters, tag = self.counters[pool], handle & TAG_MASK
        counters[tag] -= 1
        if tag == ZERO:
            return NOTHING
        length, segment = handle >> LENGTH_SHIFT & LENGTH_MASK, handle >> SEGMENT_SHIFT
        size = (RECORD_HEADER_BYTES + length + GRAIN_MASK) & ~GRAIN_MASK
        counters[COMPRESSED_BYTES] -= length
        counters[LIVE_BYTES] -= size
        self.pages[segment] -= 1
        live = self.live[segment] = self.live[segment] - size
        if self._base[segment] < 0:
            self._add_on_tier(SegmentId(segment), tag, -1, -size, counters)
        if not live:
            return EMPTIED
        # Most drops end here: the index is touched only when the segment falls below its level, 64 times in its life.
        if live < self._floor[segment] and self.occupancy.refile(SegmentId(segment), live):
            return SPARSE
        return NOTHING

    def move(self, old: int, new: int, pool: PoolId = ONLY_POOL) -> None:
        """A slot refers to the record of `new` now, no longer to that of `old`, which a merge has copied.

        What that leaves of the source is the merge's to look at, once it has moved all records.
        """
        source, target = handle_segment(old), handle_segment(new)
        if (old ^ new) & ENCODING_MASK or self._kind(source) != self._kind(target):
            self.drop(old, pool)
            self.store(new, pool)
            return
        # The same bytes in a segment of the same kind: no total changes. Nearly every move is one of these.
        size = handle_record_bytes(old)
        self.live[source] -= size
        self.pages[source] -= 1
        self.live[target] += size
        self.pages[target] += 1

    # ---- places of segments ----------------------------------------------------------------------------------------

    def file(self, segment: SegmentId, aside: bool = False) -> None:
        """`segment` lies in RAM or on the tier, and is a candidate for merges; `aside`: not before a record of it is dropped."""
        segments, live = self._segments, self.live[segment]
        file = self.occupancy.set_aside if aside else self.occupancy.add
        if self._base[segment] < 0:
            file(TIER, segment, live, whole_blocks(segments.fill(segment)))
        else:
            # A frame is held whole, however little of it is filled.
            file(segments.lane(segment), segment, live, SEGMENT_BYTES)

    def withdraw(self, segment: SegmentId) -> None:
        """`segment` is being written, merged or freed: no candidate for now."""
        self.occupancy.remove(segment)

    def written_back(self, segment: SegmentId, pool: PoolId = ONLY_POOL) -> None:
        """`segment` lies on the tier now, with all its live records, and no longer in RAM."""
        counters = self.counters[pool]
        # It comes from RAM, where no segment is cold: so its tags are not needed.
        counters[TIER_PAGES] += self.pages[segment]
        counters[TIER_LIVE_BYTES] += self.live[segment]
        self.file(segment)

    def adopt(self, live: array[int], pages: array[int], pools: Sequence[Totals]) -> None:
        """Take over what a scan has found, at a start: `live` bytes and `pages` by segment, totals by pool."""
        self.live[:], self.pages[:] = live, pages
        for counters, found in zip(self.counters, pools, strict=True):
            counters[:TAGS] = found.pages_by_tag
            counters[COMPRESSED_BYTES] = found.compressed_bytes
            counters[LIVE_BYTES] = found.live_bytes
            counters[TIER_PAGES] = found.tier_pages
            counters[TIER_LIVE_BYTES] = found.tier_live_bytes
            counters[COLD_PAGES] = found.cold_pages
            counters[COLD_RAW_PAGES] = found.cold_raw_pages

    # ---- read ------------------------------------------------------------------------------------------------------

    def totals(self, pool: PoolId = ONLY_POOL) -> Totals:
        """What `pool` holds. Under the lock or outdated."""
        counters = self.counters[pool]
        return Totals(tuple(counters[:TAGS]), *counters[TAGS:STORES])

    def sum_of(self, counter: int) -> int:
        """One counter over all pools: a tag, or one of those above. Under the lock or outdated."""
        return sum(counters[counter] for counters in self.counters)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _add_on_tier(self, segment: SegmentId, tag: int, pages: int, live_bytes: int, counters: list[int]) -> None:
        counters[TIER_PAGES] += pages
        counters[TIER_LIVE_BYTES] += live_bytes
        if self._is_cold[segment]:
            counters[COLD_PAGES] += pages
            if tag == RAW:
                counters[COLD_RAW_PAGES] += pages

    def _kind(self, segment: SegmentId) -> tuple[bool, int]:
        return self._base[segment] < 0, self._is_cold[segment]
