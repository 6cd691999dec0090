"""The segment table: the life of a segment as data, and what a recovery finds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from struct import Struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmemfs.errors import TmemfsError
from tmemfs.store.frames import Frame
from tmemfs.store.record import SegmentId
from tmemfs.store.region import Region
from tmemfs.store.segments import (
    CLEAN,
    FREE,
    IN_RAM,
    LANE_PACKED,
    LANE_RAW,
    MERGING,
    MOST_BOTH,
    ON_TIER,
    OPEN,
    RECORD_BYTES,
    SEALED,
    STATE_NAMES,
    TRANSITIONS,
    WRITING,
    SegmentTable,
    table_bytes,
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
    region = Region("segments", table_bytes(COUNT))
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
        CLEAN: (SEALED, WRITING, CLEAN),
    }
    for step in steps[state]:
        table.move(segment, step, index)
    return segment


def place_of(table: SegmentTable, segment: SegmentId) -> int:
    return table.extent(segment) if table.state(segment) == ON_TIER else table.frame(segment)


@pytest.mark.parametrize(("old", "new"), sorted(TRANSITIONS))
def test_every_legal_transition_is_made(table: SegmentTable, old: int, new: int) -> None:
    table.words[0] = old | LANE_RAW << 8 | 5 << 16
    table.move(SegmentId(0), new, 6)
    assert (table.state(SegmentId(0)), table.lane(SegmentId(0)), table.words[0] >> 16) == (new, LANE_RAW, 6)


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
    assert {old for old, new in TRANSITIONS if new == FREE} == {OPEN, SEALED, WRITING, MERGING, ON_TIER, CLEAN}


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


def test_a_clean_segment_has_a_frame_and_an_extent(table: SegmentTable, region: Region) -> None:
    segment = use(table, WRITING, 3)
    table.keep_clean(segment, Frame(MOST_BOTH - 1), Extent(MOST_BOTH - 2))
    for found in (table, SegmentTable(COUNT, region)):
        assert (found.state(segment), found.frame(segment), found.extent(segment)) == (CLEAN, MOST_BOTH - 1, MOST_BOTH - 2)
    table.move(segment, ON_TIER, table.extent(segment))
    assert (table.extent(segment), table.base[segment]) == (MOST_BOTH - 2, -1)


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


@pytest.mark.parametrize(
    ("state", "found"), [(OPEN, SEALED), (SEALED, SEALED), (WRITING, SEALED), (ON_TIER, ON_TIER), (CLEAN, CLEAN)]
)
def test_a_recovery_seals_what_was_open_or_being_written(table: SegmentTable, region: Region, state: int, found: int) -> None:
    segment = use(table, state, index=4, lane=LANE_RAW, fill=8000)
    recovered = SegmentTable(COUNT, region)
    assert recovered.recover() == [segment]
    assert (recovered.state(segment), recovered.lane(segment), place_of(recovered, segment)) == (found, LANE_RAW, 4)
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
    region = Region("segments", table_bytes(COUNT))
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


def test_a_region_without_the_word_behind_its_records_is_refused() -> None:
    count = 4096 // RECORD_BYTES
    short, long = Region("segments", count * RECORD_BYTES), Region("segments", table_bytes(count))
    with pytest.raises(TmemfsError, match="too few for 128 segments"):
        SegmentTable(count, short)
    assert list(SegmentTable(count, long).extents_touched) == [0]
    short.close()
    long.close()
