"""Recovery: derives the state of the store from its regions, at every start, by one scan of slots and segments.

New regions are empty, so a first start is the recovery of nothing. `recount` is the scan. It also is what `consistency.check`
compares the ledger with, so it uses nothing of the ledger. `count_pool` is its loop in Python. A start uses the compiled form
(native.py), because nobody gets a page meanwhile.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tmemfs.errors import TmemfsError
from tmemfs.store.codec import RAW, ZERO
from tmemfs.store.dictionary import Dictionaries
from tmemfs.store.ledger import Totals
from tmemfs.store.record import (
    TAGS,
    handle_length,
    handle_offset,
    handle_record_bytes,
    handle_segment,
    handle_tag,
    whole_blocks,
)
from tmemfs.store.segments import CLEAN, FREE, LANE_COLD, ON_TIER, SEALED, SegmentTable
from tmemfs.store.slots import SlotTable
from tmemfs.store.transitions import Transitions

#: Adds what a pool has in each segment to live bytes and pages by segment, and returns the pool's totals.
CountPool = Callable[[SlotTable, SegmentTable, "array[int]", "array[int]"], Totals]


@dataclass(frozen=True, slots=True)
class Recount:
    """What one scan has found: live bytes and pages by segment, totals by pool."""

    live: array[int]
    pages: array[int]
    pools: tuple[Totals, ...]


def count_pool(slots: SlotTable, segments: SegmentTable, live: array[int], pages: array[int]) -> Totals:
    """See CountPool. Raises TmemfsError where a handle refers to nothing."""
    by_tag = [0] * TAGS
    compressed = all_live = tier_pages = tier_live = cold = cold_raw = 0
    for slot in slots.occupied(0, slots.count):
        handle = slots.handles[slot]
        tag, size = handle_tag(handle), handle_record_bytes(handle)
        by_tag[tag] += 1
        if tag == ZERO:
            continue
        segment = handle_segment(handle)
        # A handle that points nowhere would have loads read memory of other pages.
        if segment >= segments.count or segments.state(segment) == FREE or handle_offset(handle) + size > segments.fill(segment):
            raise TmemfsError(f"bug in tmemfs: the handle of slot {slot} refers to no record; please report it")
        live[segment] += size
        pages[segment] += 1
        compressed += handle_length(handle)
        all_live += size
        if segments.state(segment) == ON_TIER:
            tier_pages += 1
            tier_live += size
            if segments.lane(segment) == LANE_COLD:
                cold += 1
                cold_raw += tag == RAW
    return Totals(tuple(by_tag), compressed, all_live, tier_pages, tier_live, cold, cold_raw)


def recount(pools: Sequence[SlotTable], segments: SegmentTable, count: CountPool = count_pool) -> Recount:
    """Scan the slots of every pool once, each with `count`. Raises TmemfsError where a handle refers to nothing."""
    live, pages = (array("i", [0]) * segments.count for _ in range(2))
    return Recount(live, pages, tuple(count(slots, segments, live, pages) for slots in pools))


def recover(pools: Sequence[SlotTable], transitions: Transitions, dictionaries: Dictionaries, count: CountPool) -> None:
    """Derive free lists, lanes, ledger and index from the regions; `count` is `count_pool`, or its compiled form."""
    segments, ledger = transitions.segments, transitions.ledger
    used = segments.recover()
    # A number means one dictionary, also for segments that are on the tier since an earlier run.
    dictionaries.number_above(max(segments.dictionaries(), default=0))
    on_tier = [segment for segment in used if segments.state(segment) in (ON_TIER, CLEAN)]
    transitions.arena.adopt({segments.frame(segment) for segment in used if segments.state(segment) != ON_TIER})
    extents = {segments.extent(segment): whole_blocks(segments.fill(segment)) for segment in on_tier}
    transitions.extents.adopt(extents, segments.extents_touched)
    # After `segments.recover`, as the scan asks for states and lanes.
    found = recount(pools, segments, count)
    ledger.adopt(found.live, found.pages, found.pools)
    # By age, so that the lanes are in order again.
    for segment in used:
        if segments.state(segment) == SEALED:
            transitions.queue(segment)
        elif segments.state(segment) == CLEAN:
            transitions.clean.append(segment, ledger.live[segment])
        elif ledger.live[segment]:
            ledger.file(segment)
    # A crash may have come between a segment's last record being dropped and the segment being freed.
    for segment in used:
        if not ledger.live[segment]:
            transitions.emptied(segment)
