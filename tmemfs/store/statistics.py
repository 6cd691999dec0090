"""Statistics: what the store holds and has done, for people and for the control files. Reads only."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from typing import Final

from tmemfs.store.codec import FILL, LZ4, RAW, ZERO, ZSTD, ZSTD_DICT
from tmemfs.store.ledger import Totals
from tmemfs.store.record import SegmentId
from tmemfs.store.segments import FREE, LANES, STATE_NAMES
from tmemfs.store.tmem import Tmem
from tmemfs.units import SEGMENT_BYTES

#: Segments that are read under one hold of the lock: some 20 us.
_LINES_AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class TmemStatistics:
    """What the store holds (pages live now, bytes) and has done (pages since the start).

    `stored_bytes` are all payloads since the start. Amplification is bytes occupied per byte of live records, open segments left
    out.
    """

    pages_stored: int
    pages_in_ram: int
    pages_on_disk: int
    zero_pages: int
    fill_pages: int
    raw_pages: int
    compressed_bytes: int
    pool_current: int
    pool_used: int
    pool_peak: int
    backing_current: int
    segments_on_disk: int
    stores: int
    loads_ram: int
    loads_disk: int
    invalidates: int
    lz4_pages: int
    zstd_pages: int
    zstd_dict_pages: int
    stored_bytes: int
    ram_amplification: float
    disk_amplification: float


@dataclass(frozen=True, slots=True)
class SegmentLine:
    """One segment that is not free; `fill_bytes` hold records, `live_bytes` of them are still referred to."""

    segment: int
    state: str
    lane: str
    sequence: int
    fill_bytes: int
    live_bytes: int
    pages: int


def statistics(tmem: Tmem) -> TmemStatistics:
    """The state as it is now, in one consistent reading that looks at no segment."""
    with tmem.lock:
        totals, counts, arena = tmem.ledger.totals(), tmem.counts, tmem.arena
        by_tag = totals.pages_by_tag
        stored = sum(by_tag)
        return TmemStatistics(
            pages_stored=stored,
            pages_in_ram=stored - by_tag[ZERO] - totals.tier_pages,
            pages_on_disk=totals.tier_pages,
            zero_pages=by_tag[ZERO],
            fill_pages=by_tag[FILL],
            raw_pages=by_tag[RAW],
            compressed_bytes=totals.compressed_bytes,
            pool_current=arena.held * SEGMENT_BYTES,
            pool_used=len(arena.used) * SEGMENT_BYTES,
            pool_peak=arena.peak * SEGMENT_BYTES,
            backing_current=tmem.extents.held_bytes,
            segments_on_disk=len(tmem.extents.out),
            stores=counts.stores,
            loads_ram=counts.loads_ram,
            loads_disk=counts.loads_disk,
            invalidates=counts.invalidates,
            lz4_pages=by_tag[LZ4],
            zstd_pages=by_tag[ZSTD],
            zstd_dict_pages=by_tag[ZSTD_DICT],
            stored_bytes=counts.stored_bytes,
            ram_amplification=tmem.merges.space_in_ram().amplification,
            disk_amplification=tmem.merges.space().amplification,
        )


def lane_pages(totals: Totals) -> tuple[int, int, int]:
    """Live pages in segments of each of LANES, in RAM and on the tier.

    A page's tag tells its lane in RAM. So only pages that were cleaned, which have left that lane, are counted by themselves.
    """
    by_tag = totals.pages_by_tag
    raw = by_tag[RAW] - totals.cold_raw_pages
    return sum(by_tag) - by_tag[ZERO] - totals.cold_pages - raw, raw, totals.cold_pages


def segment_lines(tmem: Tmem) -> list[SegmentLine]:
    """Every segment that is not free, oldest first; read a few at a time, so that others may move between two of them."""
    table, found = tmem.segments, list[tuple[int, SegmentLine]]()
    # Not under one hold of the lock: of thousands of segments that would be milliseconds.
    for first in range(0, table.touched, _LINES_AT_ONCE):
        with tmem.lock:
            some = map(SegmentId, range(first, min(first + _LINES_AT_ONCE, table.touched)))
            found += [(table.age(s), _line_of(tmem, s)) for s in some if table.state(s) != FREE]
    return [line for _, line in sorted(found, key=itemgetter(0))]


def _line_of(tmem: Tmem, segment: SegmentId) -> SegmentLine:
    table = tmem.segments
    return SegmentLine(
        segment,
        STATE_NAMES[table.state(segment)],
        LANES[table.lane(segment)],
        table.sequence(segment),
        table.fill(segment),
        tmem.ledger.live[segment],
        tmem.ledger.pages[segment],
    )
