"""The segment table and the extents: the life of a segment as data, what a recovery finds, disk space counted to the byte."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from struct import Struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmemfs.errors import TmemfsError
from tmemfs.store.record import SegmentId
from tmemfs.store.region import Region
from tmemfs.store.segments import (
    FREE,
    IN_RAM,
    LANE_PACKED,
    LANE_RAW,
    MERGING,
    ON_TIER,
    OPEN,
    RECORD_BYTES,
    SEALED,
    STATE_NAMES,
    TRANSITIONS,
    WRITING,
    Extents,
    SegmentTable,
)
from tmemfs.tiers.tier import Extent
from tmemfs.units import SEGMENT_BYTES

COUNT = 8
STATES = range(len(STATE_NAMES))
#: A record of the region: place, fill, sequence, reserved.
RECORD = Struct(("<" if sys.byteorder == "little" else ">") + "QQQQ")
ILLEGAL = sorted(set(product(STATES, STATES)) - TRANSITIONS)


@pytest.fixture
def region() -> Iterator[Region]:
    region = Region("segments", COUNT * RECORD_BYTES)
    yield region
    region.close()


@pytest.fixture
def table(region: Region) -> SegmentTable:
    return SegmentTable(COUNT, region)


def record_in(region: Region, segment: int) -> tuple[int, ...]:
    return RECORD.unpack_from(region.view, segment * RECORD_BYTES)


def use(table: SegmentTable, state: int, index: int = 0, lane: int = LANE_PACKED, fill: int = 4096) -> SegmentId:
    """A segment brought to `state` by legal steps."""
    segment = table.take()
    table.open(segment, lane, index)
    table.set_fill(segment, fill)
    steps = {
        OPEN: (),
        SEALED: (SEALED,),
        MERGING: (SEALED, MERGING),
        WRITING: (SEALED, WRITING),
        ON_TIER: (SEALED, WRITING, ON_TIER),
    }
    for step in steps[state]:
        table.move(segment, step, index)
    return segment


@pytest.mark.parametrize(("old", "new"), sorted(TRANSITIONS))
def test_every_legal_transition_is_made(table: SegmentTable, old: int, new: int) -> None:
    table.words[0] = old | LANE_RAW << 8 | 5 << 16
    table.move(SegmentId(0), new, 6)
    assert (table.state(SegmentId(0)), table.lane(SegmentId(0)), table.index(SegmentId(0))) == (new, LANE_RAW, 6)


@pytest.mark.parametrize(("old", "new"), ILLEGAL)
def test_every_other_transition_is_a_bug(table: SegmentTable, old: int, new: int) -> None:
    table.words[0] = before = old | LANE_RAW << 8 | 5 << 16
    with pytest.raises(TmemfsError, match=f"bug in tmemfs: .* from {STATE_NAMES[old]} to {STATE_NAMES[new]}; please report"):
        table.move(SegmentId(0), new, 6)
    assert table.words[0] == before


def test_a_segment_can_reach_every_state_and_become_free_again() -> None:
    reached = {FREE}
    while more := {new for old, new in TRANSITIONS if old in reached} - reached:
        reached |= more
    assert reached == set(STATES)
    assert {old for old, new in TRANSITIONS if new == FREE} == {OPEN, SEALED, WRITING, MERGING, ON_TIER}


def test_an_opened_segment_is_empty_and_in_its_frame(table: SegmentTable, region: Region) -> None:
    segment = table.take()
    table.set_fill(segment, 12345)
    assert table.open(segment, LANE_RAW, 3) == 1
    assert record_in(region, segment) == (OPEN | LANE_RAW << 8 | 3 << 16, 0, 1, 1)
    assert table.base[segment] == 3 * SEGMENT_BYTES


def test_each_use_of_a_segment_has_the_next_sequence(table: SegmentTable) -> None:
    sequences = []
    for _ in range(5):
        segment = use(table, SEALED)
        sequences.append(table.sequence(segment))
        table.move(segment, FREE, 0)
    assert sequences == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("state", sorted(IN_RAM))
def test_a_segment_in_ram_has_a_base(table: SegmentTable, state: int) -> None:
    assert table.base[use(table, state, index=2)] == 2 * SEGMENT_BYTES


def test_a_segment_on_the_tier_has_no_base_and_keeps_lane_fill_and_sequence(table: SegmentTable, region: Region) -> None:
    segment = use(table, WRITING, index=2, lane=LANE_RAW, fill=777)
    table.move(segment, ON_TIER, 9)
    assert table.base[segment] == -1
    assert record_in(region, segment) == (ON_TIER | LANE_RAW << 8 | 9 << 16, 777, 1, 1)


def test_a_failed_write_leaves_the_segment_where_it_was(table: SegmentTable) -> None:
    segment = use(table, WRITING, index=2)
    table.move(segment, SEALED, 2)
    assert (table.state(segment), table.base[segment]) == (SEALED, 2 * SEGMENT_BYTES)


def test_all_segments_can_be_taken_and_one_more_is_a_bug(table: SegmentTable) -> None:
    assert [table.take() for _ in range(COUNT)] == list(range(COUNT))
    with pytest.raises(TmemfsError, match="bug in tmemfs: the segment table is full"):
        table.take()


def test_a_freed_segment_is_taken_before_an_untouched_one(table: SegmentTable) -> None:
    first = use(table, SEALED)
    use(table, SEALED)
    table.move(first, FREE, 0)
    assert table.take() == first
    assert table.take() == 2


def test_segments_in_use_are_listed_by_age(table: SegmentTable) -> None:
    first, second = use(table, SEALED), use(table, SEALED)
    table.move(first, FREE, 0)
    again = use(table, OPEN)
    assert again == first
    assert table.in_use() == [second, again]


def test_pins_are_counted(table: SegmentTable) -> None:
    segment = use(table, ON_TIER)
    table.pin(segment)
    table.pin(segment)
    assert table.pins == {segment: 2}
    assert [table.unpin(segment), table.unpin(segment)] == [False, True]
    assert table.pins == {}


def test_a_segment_without_a_pin_cannot_lose_one(table: SegmentTable) -> None:
    with pytest.raises(KeyError):
        table.unpin(use(table, ON_TIER))


@pytest.mark.parametrize(("state", "found"), [(OPEN, SEALED), (SEALED, SEALED), (WRITING, SEALED), (ON_TIER, ON_TIER)])
def test_a_recovery_seals_what_was_open_or_being_written(table: SegmentTable, region: Region, state: int, found: int) -> None:
    segment = use(table, state, index=4, lane=LANE_RAW, fill=8000)
    recovered = SegmentTable(COUNT, region)
    assert recovered.recover() == [segment]
    assert (recovered.state(segment), recovered.lane(segment), recovered.index(segment)) == (found, LANE_RAW, 4)
    assert (recovered.fill(segment), recovered.sequence(segment)) == (8000, 1)
    assert recovered.base[segment] == (-1 if found == ON_TIER else 4 * SEGMENT_BYTES)


def test_a_recovery_finds_every_segment_by_age_and_gives_out_the_others(table: SegmentTable, region: Region) -> None:
    old, freed, young = (use(table, SEALED, index) for index in range(3))
    table.move(freed, FREE, 0)
    recovered = SegmentTable(COUNT, region)
    assert recovered.recover() == recovered.in_use() == [old, young]
    assert sorted(recovered.take() for _ in range(COUNT - 2)) == sorted(set(range(COUNT)) - {old, young})
    with pytest.raises(TmemfsError, match="full"):
        recovered.take()


def test_a_recovery_of_an_empty_region_finds_nothing(table: SegmentTable) -> None:
    assert table.recover() == []
    assert (table.take(), table.next_sequence) == (0, 1)


def test_the_sequence_of_a_freed_segment_is_not_used_again_after_a_recovery(table: SegmentTable, region: Region) -> None:
    table.move(use(table, SEALED), FREE, 0)
    recovered = SegmentTable(COUNT, region)
    recovered.recover()
    assert recovered.open(recovered.take(), LANE_PACKED, 0) == 2


@given(st.lists(st.sampled_from(["open", "seal", "free", "recover"]), max_size=40))
def test_no_sequence_is_used_twice_over_any_number_of_recoveries(steps: list[str]) -> None:
    region = Region("segments", COUNT * RECORD_BYTES)
    table = SegmentTable(COUNT, region)
    given_out: list[int] = []
    for step in steps:
        used = table.in_use()
        if step == "open" and len(used) < COUNT:
            given_out.append(table.open(table.take(), LANE_PACKED, 0))
        elif step == "seal" and used and table.state(used[0]) == OPEN:
            table.move(used[0], SEALED, 0)
        elif step == "free" and used and table.state(used[0]) == SEALED:
            table.move(used[0], FREE, 0)
        elif step == "recover":
            table = SegmentTable(COUNT, region)
            assert table.recover() == used
    assert given_out == sorted(set(given_out))
    region.close()


def test_the_lowest_free_extent_is_taken_first() -> None:
    extents = Extents(8)
    assert [extents.take(4096) for _ in range(4)] == [0, 1, 2, 3]
    discard(extents, 2, 0)
    assert [extents.take(4096) for _ in range(3)] == [0, 2, 4]


def discard(extents: Extents, *numbers: int) -> None:
    for number in numbers:
        extents.retire(Extent(number))
    extents.discarded(extents.take_retired(len(numbers)), ok=True)


def test_extents_end_with_their_number() -> None:
    extents = Extents(2, limit_bytes=100 * SEGMENT_BYTES)
    assert [extents.take(4096) for _ in range(3)] == [0, 1, None]


def test_extents_are_limited_to_their_size_unless_told() -> None:
    assert Extents(3).limit_bytes == 3 * SEGMENT_BYTES
    assert Extents(3, 0).take(4096) is None


def test_the_limit_is_in_bytes_of_whole_blocks() -> None:
    extents = Extents(8, limit_bytes=10 * 4096)
    assert extents.take(6 * 4096) == 0
    assert extents.take(5 * 4096) is None
    assert extents.take(4 * 4096) == 1
    assert extents.held_bytes == 10 * 4096
    assert extents.take(4096) is None


def test_a_limit_below_what_is_out_takes_nothing_back() -> None:
    extents = Extents(8)
    extents.take(SEGMENT_BYTES)
    extents.limit_bytes = 0
    assert (extents.held_bytes, extents.out, extents.take(4096)) == (SEGMENT_BYTES, {0: SEGMENT_BYTES}, None)


def test_a_dying_extent_is_held_until_its_hole_is_punched() -> None:
    extents = Extents(1)
    extents.take(8192)
    extents.retire(Extent(0))
    assert (extents.held_bytes, extents.retired_bytes, extents.out, extents.take(4096)) == (8192, 8192, {}, None)
    taken = extents.take_retired(9)
    assert (extents.held_bytes, extents.retired_bytes, extents.take(4096)) == (8192, 8192, None)
    extents.discarded(taken, ok=True)
    assert (extents.held_bytes, extents.retired_bytes, extents.take(4096)) == (0, 0, 0)


def test_a_hole_that_could_not_be_punched_is_written_over_or_tried_again() -> None:
    extents = Extents(3)
    for _ in range(2):
        extents.take(8192)
    fail_to_discard(extents, 1, 0)
    assert (extents.held_bytes, extents.retired_bytes, extents.take_retired(9)) == (16384, 16384, ())
    assert extents.take(4096) == 0  # and no free one, which would need more disk
    assert (extents.held_bytes, extents.retired_bytes) == (12288, 8192)
    extents.punch_again()
    assert extents.take_retired(9) == (1,) and not extents.has_stale


def fail_to_discard(extents: Extents, *numbers: int) -> None:
    for number in numbers:
        extents.retire(Extent(number))
    extents.discarded(extents.take_retired(len(numbers)), ok=False)


def test_extents_whose_holes_could_not_be_punched_keep_no_segment_away() -> None:
    """Also where the segments that come are larger than those that were there."""
    extents = Extents(4, limit_bytes=2 * SEGMENT_BYTES, reserve_bytes=SEGMENT_BYTES)
    before = extents.free_bytes
    for _ in range(4):
        extents.take(SEGMENT_BYTES // 4, for_cleaning=True)
    fail_to_discard(extents, 0, 1, 2, 3)
    assert extents.free_bytes == before
    assert extents.take(SEGMENT_BYTES) == 0 and extents.take(SEGMENT_BYTES) is None


def test_without_holes_an_extent_is_free_as_soon_as_it_is_empty() -> None:
    extents = Extents(4)
    for _ in range(4):
        extents.take(4096)
    extents.retire(Extent(3))
    being_punched = extents.take_retired(1)
    fail_to_discard(extents, 2)
    extents.retire(Extent(1))
    extents.punch_none()
    assert (extents.held_bytes, extents.retired_bytes, extents.has_retired, extents.has_stale) == (8192, 4096, False, False)
    extents.retire(Extent(0))
    extents.discarded(being_punched, ok=False)
    assert (extents.held_bytes, extents.retired_bytes) == (0, 0)
    assert [extents.take(4096) for _ in range(4)] == [0, 1, 2, 3]


def test_what_died_first_is_punched_first_in_order_and_no_more_than_asked_for() -> None:
    extents = Extents(8)
    for _ in range(5):
        extents.take(4096)
    for number in (4, 1, 3, 0):
        extents.retire(Extent(number))
    assert [extents.take_retired(2), extents.take_retired(9), extents.take_retired(9)] == [(1, 4), (0, 3), ()]


def test_only_what_is_out_can_be_retired() -> None:
    with pytest.raises(KeyError):
        Extents(2).retire(Extent(0))


def test_adopted_extents_are_out_and_the_ones_between_them_free() -> None:
    extents = Extents(6)
    extents.adopt({Extent(1): 4096, Extent(4): 8192})
    assert extents.held_bytes == 12288
    assert [extents.take(4096) for _ in range(5)] == [0, 2, 3, 5, None]


@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "die", "plan", "done", "failed", "limit", "again", "none"]), st.integers(0, 20)),
        max_size=60,
    )
)
def test_every_extent_is_free_out_dying_or_stale_and_counted_until_it_is_free(steps: list[tuple[str, int]]) -> None:
    extents = Extents(5)
    out: dict[Extent, int] = {}
    retired: dict[Extent, int] = {}
    planned: dict[Extent, int] = {}
    stale: dict[Extent, int] = {}
    has_holes = True
    for step, number in steps:
        if step == "take":
            extent = extents.take(number * 4096)
            free = set(map(Extent, range(5))) - out.keys() - retired.keys() - planned.keys() - stale.keys()
            fits = extents.limit_bytes >= sum((*out.values(), *retired.values(), *planned.values())) + number * 4096
            assert extent == (next(iter(stale), min(free, default=None)) if fits else None)
            if extent is not None:
                stale.pop(extent, None)
                out[extent] = number * 4096
        elif step == "die" and out:
            extent = sorted(out)[number % len(out)]
            extents.retire(extent)
            size = out.pop(extent)
            if has_holes:
                retired[extent] = size
        elif step == "plan":
            taken = extents.take_retired(number)
            assert list(taken) == sorted(list(retired)[:number])
            planned |= {extent: retired.pop(extent) for extent in taken}
        elif step in ("done", "failed") and planned:
            extents.discarded(tuple(planned), ok=step == "done")
            if step == "failed" and has_holes:
                stale |= planned
            planned = {}
        elif step == "again":
            extents.punch_again()
            retired |= stale
            stale = {}
        elif step == "none" and number == 0:
            extents.punch_none()
            has_holes, retired, stale = False, {}, {}
        elif step == "limit":
            extents.limit_bytes = number * 4096
        assert extents.out == out
        assert extents.retired_bytes == sum(retired.values()) + sum(planned.values()) + sum(stale.values())
        assert extents.has_stale == bool(stale)
        assert extents.held_bytes == sum(out.values()) + extents.retired_bytes


def test_the_reserve_is_for_cleaning_alone() -> None:
    extents = Extents(8, 6 * SEGMENT_BYTES, reserve_bytes=2 * SEGMENT_BYTES)
    assert extents.free_bytes == 4 * SEGMENT_BYTES
    assert [extents.take(SEGMENT_BYTES) for _ in range(5)] == [0, 1, 2, 3, None]
    assert extents.free_bytes == 0
    assert [extents.take(SEGMENT_BYTES, for_cleaning=True) for _ in range(3)] == [4, 5, None]


def test_the_reserve_is_of_the_extents_too() -> None:
    extents = Extents(4, 100 * SEGMENT_BYTES, reserve_bytes=2 * SEGMENT_BYTES)
    assert [extents.take(4096) for _ in range(3)] == [0, 1, None]
    assert extents.take(4096, for_cleaning=True) == 2


def test_an_extent_that_needs_less_than_was_taken_gives_the_rest_back() -> None:
    extents = Extents(4)
    extent = extents.take(SEGMENT_BYTES)
    assert extent is not None
    extents.resize(extent, 8192)
    assert (extents.held_bytes, extents.out) == (8192, {extent: 8192})


def test_copied_records_keep_their_age(table: SegmentTable, region: Region) -> None:
    old, new = use(table, SEALED, index=0), use(table, SEALED, index=1)
    merged = table.take()
    table.open(merged, LANE_PACKED, 2, age=table.age(old))
    table.move(merged, SEALED, 2)
    assert table.sequence(merged) > table.sequence(new) and table.age(merged) == table.age(old)
    assert table.in_use() == [old, merged, new] == SegmentTable(COUNT, region).recover()


def test_a_segment_that_was_not_used_is_taken_again(table: SegmentTable) -> None:
    segment = table.take()
    table.begin(segment)
    table.give_back(segment)
    assert table.take() == segment
