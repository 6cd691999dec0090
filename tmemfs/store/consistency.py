"""The consistency check: compares what the store has counted with a scan of slots and segments. Changes nothing."""

from __future__ import annotations

from dataclasses import fields

from tmemfs.store.ledger import PoolId, Totals
from tmemfs.store.record import ZERO_HANDLE, SegmentId, handle_length, handle_offset, handle_segment, handle_tag, scan, whole_blocks
from tmemfs.store.recovery import Recount, recount
from tmemfs.store.segments import CLEAN, LANE_COLD, LANE_PACKED, LANE_RAW, ON_TIER
from tmemfs.store.statistics import lane_pages
from tmemfs.store.tmem import Tmem
from tmemfs.units import SEGMENT_BYTES


def check(tmem: Tmem) -> None:
    """Compare the derived state with a scan. Raises AssertionError naming what differs."""
    # All under one hold of the lock, so that nothing changes between the scan and what is compared with it.
    with tmem.lock:
        found, used = recount((tmem.slots,), tmem.segments), tmem.segments.in_use()
        for segment in used:
            _check_segment(tmem, segment, found)
        for pool, totals in enumerate(found.pools):
            _check_totals(tmem, PoolId(pool), totals)
        _check_index(tmem, used)
        _check_places(tmem, used)
        _check_records(tmem)


def _check_segment(tmem: Tmem, segment: SegmentId, found: Recount) -> None:
    segments, ledger = tmem.segments, tmem.ledger
    assert ledger.live[segment] == found.live[segment], f"live bytes of segment {segment}"
    assert ledger.pages[segment] == found.pages[segment], f"pages of segment {segment}"
    assert segments.is_cold[segment] == (segments.lane(segment) == LANE_COLD), f"lane of segment {segment}"
    base = -1 if segments.state(segment) == ON_TIER else segments.frame(segment) * SEGMENT_BYTES
    assert segments.base[segment] == base, f"base of segment {segment}"


def _check_totals(tmem: Tmem, pool: PoolId, found: Totals) -> None:
    kept = tmem.ledger.totals(pool)
    for each in fields(Totals):
        assert getattr(kept, each.name) == getattr(found, each.name), f"{each.name.replace('_', ' ')} of pool {pool}"


def _check_index(tmem: Tmem, used: list[SegmentId]) -> None:
    index, live = tmem.ledger.occupancy, tmem.ledger.live
    assert all(live[segment] >= index.floor[segment] for segment in used), "occupancy index"
    # A segment that is being written or merged is in neither of them.
    sealed = sum(len(lane.sealed) for lane in tmem.lanes)
    assert sum(index.histogram(LANE_PACKED, LANE_RAW)) == sealed, "segments filed by their lanes"
    pages = [0, 0, 0]
    for segment in used:
        pages[tmem.segments.lane(segment)] += tmem.ledger.pages[segment]
    assert lane_pages(tmem.ledger.totals()) == tuple(pages), "pages by lane"


def _check_places(tmem: Tmem, used: list[SegmentId]) -> None:
    segments, extents = tmem.segments, tmem.extents
    frames = [segments.frame(segment) for segment in used if segments.state(segment) != ON_TIER]
    on_tier = {segments.extent(s): whole_blocks(segments.fill(s)) for s in used if segments.state(s) in (ON_TIER, CLEAN)}
    clean = [segment for segment in used if segments.state(segment) == CLEAN]
    kept = tmem.transitions.clean
    assert len(kept) == len(clean) and all(segment in kept for segment in clean), "clean copies"
    assert kept.tier_bytes == sum(whole_blocks(segments.fill(segment)) for segment in clean), "tier that clean copies take"
    assert len(set(frames)) == len(frames) and set(frames) == tmem.arena.used, "frames in use"
    # Extents that a write-back or a cleaning is being written to are out, too.
    assert on_tier.items() <= extents.out.items(), "extents in use"
    assert extents.held_bytes == sum(extents.out.values()) + extents.retired_bytes, "bytes held on the tier"


def _check_records(tmem: Tmem) -> None:
    """Every handle into a segment in RAM refers to a record that says the same."""
    segments = tmem.segments
    # Only in RAM: the tier is not read here. What comes from it is verified with each read.
    records = {
        (segment, offset): (slot, tag, length)
        for segment in segments.in_use()
        if segments.base[segment] >= 0
        for offset, slot, tag, length in scan(tmem.arena.frame_view(segments.frame(segment)), segments.fill(segment))
    }
    for slot in tmem.slots.occupied(0, tmem.slots.count):
        handle = tmem.slots.handles[slot]
        segment = handle_segment(handle)
        if handle > ZERO_HANDLE and segments.base[segment] >= 0:
            expected = (slot, handle_tag(handle), handle_length(handle))
            assert records.get((segment, handle_offset(handle))) == expected, f"record of slot {slot}"
