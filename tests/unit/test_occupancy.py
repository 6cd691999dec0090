"""Segments by live share: the emptiest are found without looking at the others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmemfs.store.occupancy import LEVELS, PACKED, RAW, TIER, OccupancyIndex
from tmemfs.store.record import SegmentId
from tmemfs.units import SEGMENT_BYTES


def test_candidates_are_of_every_level_the_emptiest_first_and_the_longest_there_first() -> None:
    index = OccupancyIndex(200)
    for segment in range(200):
        index.add(TIER, SegmentId(segment), SEGMENT_BYTES * (segment % 2 + 1) // 4, SEGMENT_BYTES)
    assert list(index.candidates(TIER)) == [0, 2, 4, 6, 1, 3, 5, 7]


def test_a_segment_of_which_less_lives_moves_to_a_lower_level_and_not_before() -> None:
    index = OccupancyIndex(1)
    index.add(TIER, SegmentId(0), SEGMENT_BYTES, SEGMENT_BYTES)
    assert index.floor[0] == SEGMENT_BYTES * (LEVELS - 1) // LEVELS
    index.refile(SegmentId(0), SEGMENT_BYTES // 8 - 1)
    assert index.histogram(TIER) == (1, 0, 0, 0, 0, 0, 0, 0)


def test_a_segment_that_is_not_filed_can_be_removed() -> None:
    index = OccupancyIndex(2)
    index.remove(SegmentId(1))
    index.add(TIER, SegmentId(0), 1, 4096)
    index.remove(SegmentId(0))
    assert not list(index.candidates(TIER)) and index.floor[0] == 0


def test_groups_are_apart_and_a_segment_stays_in_its_own() -> None:
    index = OccupancyIndex(3)
    for group, segment in ((PACKED, 0), (RAW, 1), (TIER, 2)):
        index.add(group, SegmentId(segment), SEGMENT_BYTES, SEGMENT_BYTES)
        index.refile(SegmentId(segment), 1)
    assert [list(index.candidates(group)) for group in (PACKED, RAW, TIER)] == [[0], [1], [2]]
    assert index.histogram(PACKED, RAW) == (2, 0, 0, 0, 0, 0, 0, 0)


def test_the_emptiest_come_first_and_those_above_the_share_not_at_all() -> None:
    index = OccupancyIndex(4)
    for segment, eighths in enumerate((4, 8, 1, 6)):
        index.add(PACKED, SegmentId(segment), SEGMENT_BYTES * eighths // 8, SEGMENT_BYTES)
    assert list(index.emptiest(PACKED, 0.8)) == [2, 0, 3]


def test_falling_below_a_half_is_told_once() -> None:
    index = OccupancyIndex(1)
    index.add(PACKED, SegmentId(0), SEGMENT_BYTES, SEGMENT_BYTES)
    told = [index.refile(SegmentId(0), SEGMENT_BYTES * sixteenths // 16) for sixteenths in (12, 8, 7, 3, 1)]
    assert told == [False, False, True, False, False]


@pytest.mark.parametrize("size", [4096, 12288, SEGMENT_BYTES])
@given(shares=st.lists(st.integers(1, 1000), min_size=1, max_size=20))
def test_a_share_is_never_below_its_floor(size: int, shares: list[int]) -> None:
    index = OccupancyIndex(1)
    index.add(TIER, SegmentId(0), size, size)
    for live in sorted((size * share // 1000 for share in shares), reverse=True):
        if live < index.floor[0]:
            index.refile(SegmentId(0), live)
        assert index.floor[0] <= live
        assert sum(index.histogram(TIER)) == 1


def test_a_segment_that_is_set_aside_is_no_candidate_before_something_in_it_is_dropped() -> None:
    index = OccupancyIndex(2)
    index.set_aside(TIER, SegmentId(0), SEGMENT_BYTES, SEGMENT_BYTES)
    index.add(TIER, SegmentId(1), SEGMENT_BYTES, SEGMENT_BYTES)
    assert list(index.candidates(TIER)) == [1] and index.histogram(TIER)[-1] == 2
    assert index.floor[0] == SEGMENT_BYTES
    index.refile(SegmentId(0), SEGMENT_BYTES - 4)
    assert list(index.candidates(TIER)) == [1, 0]
    index.remove(SegmentId(0))
    index.set_aside(TIER, SegmentId(0), 4, SEGMENT_BYTES)
    index.remove(SegmentId(0))
    assert list(index.candidates(TIER)) == [1] and index.floor[0] == 0


def test_a_segment_that_was_set_aside_falls_below_half_once() -> None:
    index = OccupancyIndex(1)
    index.set_aside(RAW, SegmentId(0), SEGMENT_BYTES, SEGMENT_BYTES)
    assert index.refile(SegmentId(0), SEGMENT_BYTES // 4)
    assert not index.refile(SegmentId(0), SEGMENT_BYTES // 8)
