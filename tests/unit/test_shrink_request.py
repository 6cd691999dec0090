"""What may be written to control/shrink."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmemfs.errors import BadValue
from tmemfs.jobs.shrink_request import ShrinkRequest
from tmemfs.units import MIB


@pytest.mark.parametrize(
    ("text", "goal", "deadline_s"),
    [
        ("64M", 64 * MIB, math.inf),
        (" 64M\n", 64 * MIB, math.inf),
        ("1", 1, math.inf),
        ("1.5G", 1536 * MIB, math.inf),
        ("all", math.inf, math.inf),
        ("64M deadline=2s", 64 * MIB, 2.0),
        ("64M  deadline=500ms\n", 64 * MIB, 0.5),
        ("all deadline=1m", math.inf, 60.0),
        ("all deadline=0", math.inf, 0.0),
        ("all deadline=2", math.inf, 2.0),
    ],
)
def test_a_request_is_a_size_and_perhaps_a_deadline(text: str, goal: float, deadline_s: float) -> None:
    assert ShrinkRequest.parse(text) == ShrinkRequest(goal, deadline_s)


@pytest.mark.parametrize("text", ["", "  ", "\n", "lots", "-5M", "10%", "max", "ALL", "deadline=2s", "64MM"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BadValue, match="is not a size: give bytes"):
        ShrinkRequest.parse(text)


@pytest.mark.parametrize("text", ["0", "0M", "0.4", "0 deadline=2s"])
def test_nothing_to_free_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadValue, match="a size above 0: write for example '64M', or 'all'"):
        ShrinkRequest.parse(text)


@pytest.mark.parametrize("text", ["64M now", "64M now=1", "64M 2s", "64 M", "64M Deadline=2s", "64M deadline=2s now"])
def test_an_unknown_setting_is_refused_with_the_known_one(text: str) -> None:
    with pytest.raises(BadValue, match=r"unknown setting .* write for example '64M deadline=2s'"):
        ShrinkRequest.parse(text)


@pytest.mark.parametrize("text", ["64M deadline", "64M deadline=", "64M deadline=soon", "64M deadline=-1s", "64M deadline= 2s"])
def test_a_deadline_that_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(BadValue, match="is not a duration: give seconds"):
        ShrinkRequest.parse(text)


@given(st.text("0123456789.-KMGTiB% =\ndeadlinems", max_size=30))
def test_any_text_is_a_request_or_refused(text: str) -> None:
    try:
        request = ShrinkRequest.parse(text)
    except BadValue:
        return
    assert request.goal_bytes > 0 and request.deadline_s >= 0
