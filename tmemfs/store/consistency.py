"""The census: what slots and segments say the store holds, counted afresh.

`census` is one scan; `recover` derives the state of a store from it at a start; `check` holds the state it has kept since against
another; `statistics` and `segment_lines` read it for people. Only `recover` changes anything.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Final

from tmemfs.errors import TmemfsError
from tmemfs.store.codec import FILL, LZ4, RAW, ZERO, ZSTD, ZSTD_DICT
from tmemfs.store.frames import Frame
from tmemfs.store.occupancy import TIER
from tmemfs.store.record import (
    TAGS,
    ZERO_HANDLE,
    SegmentId,
    handle_length,
    handle_offset,
    handle_record_bytes,
    handle_segment,
    handle_tag,
    scan,
    whole_blocks,
)
from tmemfs.store.segments import FREE, LANE_COLD, LANE_PACKED, LANE_RAW, LANES, ON_TIER, SEALED, STATE_NAMES, SegmentTable
from tmemfs.store.slots import SlotTable
from tmemfs.tiers.tier import Extent
from tmemfs.units import SEGMENT_BYTES

if TYPE_CHECKING:
    from tmemfs.store.tmem import Tmem

#: Segments that are read under one hold of the lock: some 20 us.
_LINES_AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class Census:
    """Totals of one scan: live bytes and pages by segment, pages by tag, payload bytes, pages on the tier, cleaned pages.

    `cold_raw_pages` are the raw ones of `cold_pages`.
    """

    live: dict[SegmentId, int]
    pages: dict[SegmentId, int]
    by_tag: list[int]
    compressed_bytes: int
    disk_pages: int
    cold_pages: int
    cold_raw_pages: int


@dataclass(frozen=True, slots=True)
class TmemStatistics:
    """What the store holds (pages live now, bytes) and has done (pages since the start).

    `stored_bytes` are all payloads since the start; amplification is bytes occupied by bytes of live records, open segments left
    out; `ram_occupancy` and `disk_occupancy` are numbers of sealed segments by eighths of live share, the emptiest first;
    `lane_pages` are pages by lane (segments.LANES), in RAM and on the tier.
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
    segments_in_ram: int
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
    ram_occupancy: tuple[int, ...]
    disk_occupancy: tuple[int, ...]
    lane_pages: tuple[int, ...]


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


def census(slots: SlotTable, segments: SegmentTable) -> Census:
    """Scan every slot and every segment once. Raises TmemfsError where a handle refers to nothing."""
    live: dict[SegmentId, int] = defaultdict(int)
    pages: dict[SegmentId, int] = defaultdict(int)
    by_tag = [0] * TAGS
    compressed = disk_pages = cold_pages = cold_raw_pages = 0
    for slot in slots.occupied(0, slots.count):
        handle = slots.handles[slot]
        by_tag[handle_tag(handle)] += 1
        if handle_tag(handle) == ZERO:
            continue
        segment = handle_segment(handle)
        size = handle_record_bytes(handle)
        if segment >= segments.count or segments.state(segment) == FREE or handle_offset(handle) + size > segments.fill(segment):
            raise TmemfsError(f"bug in tmemfs: the handle of slot {slot} refers to no record; please report it")
        live[segment] += size
        pages[segment] += 1
        compressed += handle_length(handle)
        if segments.state(segment) == ON_TIER:
            disk_pages += 1
            if segments.lane(segment) == LANE_COLD:
                cold_pages += 1
                cold_raw_pages += handle_tag(handle) == RAW
    return Census(dict(live), dict(pages), by_tag, compressed, disk_pages, cold_pages, cold_raw_pages)


def recover(tmem: Tmem) -> None:
    """Derive everything of `tmem` from its regions, as at every start; new regions are empty."""
    segments = tmem.segments
    used = segments.recover()
    tmem.dictionaries.number_above(max(segments.dictionaries(), default=0))
    tmem.arena.adopt({Frame(segments.index(s)) for s in used if segments.state(s) != ON_TIER})
    on_tier = [s for s in used if segments.state(s) == ON_TIER]
    tmem.extents.adopt({Extent(segments.index(s)): whole_blocks(segments.fill(s)) for s in on_tier})
    found = census(tmem.slots, segments)
    for segment in used:
        segments.live[segment] = found.live.get(segment, 0)
        segments.pages[segment] = found.pages.get(segment, 0)
        if segments.state(segment) == SEALED:
            tmem.lane_of(segment).append(segment, segments.live[segment])
        elif segments.live[segment]:
            tmem.file_on_tier(segment)
    tmem.pages_by_tag = found.by_tag
    tmem.compressed_bytes = found.compressed_bytes
    tmem.disk_pages = found.disk_pages
    tmem.cold_pages, tmem.cold_raw_pages = found.cold_pages, found.cold_raw_pages
    tmem.live_bytes = sum(found.live.values())
    for segment in used:
        if not segments.live[segment]:
            tmem.emptied(segment)


def check(tmem: Tmem) -> None:
    """Hold the derived state against a scan. Raises AssertionError naming what differs."""
    with tmem.lock:
        found = census(tmem.slots, tmem.segments)
        used = tmem.segments.in_use()
        frames = [tmem.segments.index(s) for s in used if tmem.segments.state(s) != ON_TIER]
        on_tier = {tmem.segments.index(s): whole_blocks(tmem.segments.fill(s)) for s in used if tmem.segments.state(s) == ON_TIER}
        for segment in used:
            assert tmem.segments.live[segment] == found.live.get(segment, 0), f"live bytes of segment {segment}"
            assert tmem.segments.pages[segment] == found.pages.get(segment, 0), f"pages of segment {segment}"
            in_ram = tmem.segments.state(segment) != ON_TIER
            base = tmem.segments.index(segment) * SEGMENT_BYTES if in_ram else -1
            assert tmem.segments.is_cold[segment] == (tmem.segments.lane(segment) == LANE_COLD), f"lane of segment {segment}"
            assert tmem.segments.base[segment] == base, f"base of segment {segment}"
        assert tmem.pages_by_tag == found.by_tag, "pages by tag"
        assert tmem.compressed_bytes == found.compressed_bytes, "compressed bytes"
        assert tmem.disk_pages == found.disk_pages, "pages on the tier"
        assert (tmem.cold_pages, tmem.cold_raw_pages) == (found.cold_pages, found.cold_raw_pages), "cleaned pages"
        assert tmem.lane_pages == tmem.segments.pages_by_lane(), "pages by lane"
        assert tmem.live_bytes == sum(found.live.values()), "live bytes"
        tier_live_bytes = sum(tmem.segments.live[s] for s in used if tmem.segments.state(s) == ON_TIER)
        assert tmem.tier_live_bytes == tier_live_bytes, "live bytes on the tier"
        assert all(tmem.segments.live[s] >= tmem.occupancy.floor[s] for s in used), "occupancy index"
        sealed = sum(len(lane.sealed) for lane in tmem.lanes)
        assert sum(tmem.occupancy.histogram(LANE_PACKED, LANE_RAW)) == sealed, "segments filed by their lanes"
        assert len(set(frames)) == len(frames) and set(frames) == tmem.arena.used, "frames in use"
        assert on_tier.items() <= tmem.extents.out.items(), "extents in use"
        held = sum(tmem.extents.out.values()) + tmem.extents.retired_bytes
        assert tmem.extents.held_bytes == held, "bytes held on the tier"
        _check_records(tmem)


def _check_records(tmem: Tmem) -> None:
    """Every handle into a segment in RAM refers to a record that says the same."""
    segments = tmem.segments
    records = {
        (segment, offset): (slot, tag, length)
        for segment in segments.in_use()
        if segments.base[segment] >= 0
        for offset, slot, tag, length in scan(tmem.arena.frame_view(Frame(segments.index(segment))), segments.fill(segment))
    }
    for slot in tmem.slots.occupied(0, tmem.slots.count):
        handle = tmem.slots.handles[slot]
        segment = handle_segment(handle)
        if handle > ZERO_HANDLE and segments.base[segment] >= 0:
            expected = (slot, handle_tag(handle), handle_length(handle))
            assert records.get((segment, handle_offset(handle))) == expected, f"record of slot {slot}"


def statistics(tmem: Tmem) -> TmemStatistics:
    """The state as it is now, in one consistent reading that looks at no segment; but how full they are is read just before."""
    ram_occupancy, disk_occupancy = tmem.occupancy.histogram(LANE_PACKED, LANE_RAW), tmem.occupancy.histogram(TIER)
    with tmem.lock:
        by_tag, counts, arena = tmem.pages_by_tag, tmem.counts, tmem.arena
        stored = sum(by_tag)
        return TmemStatistics(
            pages_stored=stored,
            pages_in_ram=stored - by_tag[ZERO] - tmem.disk_pages,
            pages_on_disk=tmem.disk_pages,
            zero_pages=by_tag[ZERO],
            fill_pages=by_tag[FILL],
            raw_pages=by_tag[RAW],
            compressed_bytes=tmem.compressed_bytes,
            pool_current=arena.held * SEGMENT_BYTES,
            pool_used=len(arena.used) * SEGMENT_BYTES,
            pool_peak=arena.peak * SEGMENT_BYTES,
            backing_current=tmem.extents.held_bytes,
            segments_in_ram=len(arena.used),
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
            ram_occupancy=ram_occupancy,
            disk_occupancy=disk_occupancy,
            lane_pages=tmem.lane_pages,
        )


def segment_lines(tmem: Tmem) -> list[SegmentLine]:
    """Every segment that is not free, oldest first; read a few at a time, so that others may move between two of them."""
    table, found = tmem.segments, list[tuple[int, SegmentLine]]()
    for first in range(0, table.touched, _LINES_AT_ONCE):
        with tmem.lock:
            some = map(SegmentId, range(first, min(first + _LINES_AT_ONCE, table.touched)))
            found += [(table.age(s), _line_of(table, s)) for s in some if table.state(s) != FREE]
    return [line for _, line in sorted(found, key=itemgetter(0))]


def _line_of(table: SegmentTable, segment: SegmentId) -> SegmentLine:
    return SegmentLine(
        segment,
        STATE_NAMES[table.state(segment)],
        LANES[table.lane(segment)],
        table.sequence(segment),
        table.fill(segment),
        table.live[segment],
        table.pages[segment],
    )
