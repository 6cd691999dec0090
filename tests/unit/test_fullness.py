"""Segments by live share: the emptiest are found without looking at the others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmemfs.store.fullness import LEVELS, Fullness
from tmemfs.store.record import SegmentId
from tmemfs.units import SEGMENT_BYTES


def test_candidates_are_of_every_level_the_emptiest_first_and_the_longest_there_first() -> None:
    fullness = Fullness(200)
    for segment in range(200):
        fullness.add(SegmentId(segment), SEGMENT_BYTES * (segment % 2 + 1) // 4, SEGMENT_BYTES)
    assert list(fullness.candidates()) == [0, 2, 4, 6, 1, 3, 5, 7]


def test_a_segment_of_which_less_lives_moves_to_a_lower_level_and_not_before() -> None:
    fullness = Fullness(1)
    fullness.add(SegmentId(0), SEGMENT_BYTES, SEGMENT_BYTES)
    assert fullness.floor[0] == SEGMENT_BYTES * (LEVELS - 1) // LEVELS
    fullness.refile(SegmentId(0), SEGMENT_BYTES // 8 - 1)
    assert fullness.histogram() == (1, 0, 0, 0, 0, 0, 0, 0)


def test_a_segment_that_is_not_filed_can_be_removed() -> None:
    fullness = Fullness(2)
    fullness.remove(SegmentId(1))
    fullness.add(SegmentId(0), 1, 4096)
    fullness.remove(SegmentId(0))
    assert not list(fullness.candidates()) and fullness.floor[0] == 0


@pytest.mark.parametrize("size", [4096, 12288, SEGMENT_BYTES])
@given(shares=st.lists(st.integers(1, 1000), min_size=1, max_size=20))
def test_a_share_is_never_below_its_floor(size: int, shares: list[int]) -> None:
    fullness = Fullness(1)
    fullness.add(SegmentId(0), size, size)
    for live in sorted((size * share // 1000 for share in shares), reverse=True):
        if live < fullness.floor[0]:
            fullness.refile(SegmentId(0), live)
        assert fullness.floor[0] <= live
        assert sum(fullness.histogram()) == 1
