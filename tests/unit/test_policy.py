"""Watermarks: in order whatever is asked for, and a background that stops at the lower one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmemfs.policy.cleaning import Space, benefit_per_cost, cleaning_wanted, greedy, is_sparse
from tmemfs.policy.victims import MOST_EXAMINED, next_victim
from tmemfs.policy.watermarks import Watermarks, background_goal
from tmemfs.units import MIB

MARKS = Watermarks(max=100 * MIB, high=90 * MIB, low=80 * MIB)
BYTES = st.integers(0, 1 << 40)


@pytest.mark.parametrize(
    ("high", "low", "expected"),
    [
        (None, None, (100, 90, 80)),
        (50, None, (100, 50, 50)),
        (95, None, (100, 95, 80)),
        (None, 30, (100, 90, 30)),
        (None, 95, (100, 90, 90)),
        (60, 40, (100, 60, 40)),
        (40, 60, (100, 40, 40)),
        (200, 150, (100, 100, 100)),
        (0, 0, (100, 0, 0)),
    ],
)
def test_watermarks_are_what_is_given_and_below_what_they_stay_below(
    high: int | None, low: int | None, expected: tuple[int, int, int]
) -> None:
    marks = Watermarks.below(100, high, low)
    assert (marks.max, marks.high, marks.low) == expected


@given(BYTES, st.none() | BYTES, st.none() | BYTES)
def test_low_is_never_above_high_nor_high_above_max(most: int, high: int | None, low: int | None) -> None:
    marks = Watermarks.below(most, high, low)
    assert 0 <= marks.low <= marks.high <= marks.max == most


@pytest.mark.parametrize(
    ("current", "shrinking", "goal"),
    [
        (0, False, 0),
        (85, False, 0),
        (90, False, 0),
        (91, False, 11),
        (100, False, 20),
        (91, True, 11),
        (85, True, 5),
        (81, True, 1),
        (80, True, 0),
        (79, True, 0),
    ],
)
def test_the_background_starts_above_high_and_stops_at_low(current: int, shrinking: bool, goal: int) -> None:
    assert background_goal(current * MIB, MARKS, shrinking) == goal * MIB


@given(BYTES, BYTES, BYTES, st.booleans())
def test_a_goal_leads_to_low_and_not_below(current: int, high: int, low: int, shrinking: bool) -> None:
    marks = Watermarks.below(1 << 40, high, low)
    goal = background_goal(current, marks, shrinking)
    assert goal in (0, current - marks.low)
    assert goal >= 0
    assert background_goal(current - goal, marks, shrinking=True) == 0 or goal == 0


def test_a_pool_that_grows_is_shrunk_once_from_high_to_low_not_at_every_step() -> None:
    current, shrinking, starts = 0, False, 0
    for _ in range(100):
        current += MIB
        goal = background_goal(current, MARKS, shrinking)
        starts += goal > 0
        current -= goal
    assert starts == 1
    assert current == 80 * MIB + 9 * MIB


@pytest.mark.parametrize(
    ("loaded", "victim", "passed"),
    [("", None, ""), ("-", 0, ""), ("x-", 1, "0"), ("xx-x", 2, "01"), ("x", 0, ""), ("xxx", 0, "12")],
)
def test_a_segment_that_was_loaded_from_is_passed_over(loaded: str, victim: int | None, passed: str) -> None:
    found = next_victim((at, mark == "x") for at, mark in enumerate(loaded))
    assert found == (victim, [int(digit) for digit in passed])


def test_a_search_for_a_victim_ends() -> None:
    victim, passed = next_victim((at, at < 10 * MOST_EXAMINED) for at in range(20 * MOST_EXAMINED))
    assert victim == 0 and len(passed) == MOST_EXAMINED - 1


def test_a_segment_is_sparse_below_95_of_100() -> None:
    assert is_sparse(949, 1000) and not is_sparse(950, 1000)


def test_what_is_emptier_or_older_is_worth_more_to_clean() -> None:
    assert benefit_per_cost(0.2, 10) > benefit_per_cost(0.4, 10) > benefit_per_cost(0.9, 10)
    assert benefit_per_cost(0.5, 100) > benefit_per_cost(0.5, 10)
    assert benefit_per_cost(1.0, 1000) == 0 and greedy(0.25, 5) == greedy(0.25, 50) == 0.75


@pytest.mark.parametrize(
    ("occupied", "live", "free", "cleaning", "wanted"),
    [
        (100, 60, 999, False, True),
        (100, 70, 999, False, False),
        (100, 70, 999, True, True),
        (100, 80, 999, True, False),
        (18, 10, 999, False, True),
        (15, 8, 999, False, False),
        (1000, 900, 7, False, True),
        (1000, 900, 9, False, False),
        (1000, 900, 9, True, True),
        (1000, 995, 0, True, False),
        (64, 60, 2, False, False),
        (0, 0, 0, False, False),
    ],
)
def test_cleaning_starts_and_stops_at_different_amplifications(
    occupied: int, live: int, free: int, cleaning: bool, wanted: bool
) -> None:
    assert cleaning_wanted(Space(occupied * MIB, live * MIB, free * MIB), cleaning) is wanted


def test_amplification_of_nothing_is_one_and_of_dead_bytes_alone_two() -> None:
    assert (Space(0, 0, 1).amplification, Space(5, 0, 1).amplification, Space(6, 4, 1).amplification) == (1.0, 2.0, 1.5)
