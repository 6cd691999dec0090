"""Write-ahead: which segments have rested, and how many copies are wanted."""

from __future__ import annotations

import math

import pytest

from tmemfs.control_files import FILES
from tmemfs.errors import BadValue, OutOfRange
from tmemfs.jobs.write_ahead import MOST_PERCENT, parse_rest, parse_writeahead
from tmemfs.policy.clean_share import AgeClock, copies_wanted


@pytest.mark.parametrize(
    ("frames", "clean", "share", "wanted"), [(100, 0, 0.25, 25), (100, 24, 0.25, 1), (100, 40, 0.25, 0), (3, 0, 0.25, 0)]
)
def test_a_share_of_the_frames_is_to_be_clean(frames: int, clean: int, share: float, wanted: int) -> None:
    assert copies_wanted(frames, clean, share) == wanted


def test_a_segment_has_rested_once_its_number_was_given_out_long_enough_ago() -> None:
    clock = AgeClock(rest_s=30)
    for now in range(100):
        clock.note(now, 1 + 2 * now)
        rested = 1 + 2 * (now - 30) - 1  # the last number that had been given out 30 s ago
        assert clock.youngest == max(rested, -1)


def test_a_clock_that_is_asked_often_keeps_few_notes_and_makes_nothing_older() -> None:
    clock = AgeClock(rest_s=30)
    for tick in range(10_000):
        now = tick / 100
        clock.note(now, tick)
        assert len(clock._notes) <= 31
        assert clock.youngest <= max(tick - 3000, -1)
    assert clock.youngest >= 10_000 - 3000 - 101


def test_nothing_is_waited_for_when_all_has_rested() -> None:
    clock = AgeClock(rest_s=30)
    clock.note(0, 5)
    assert clock.wait_s(10) == 20
    clock.note(31, 5)
    assert (clock.youngest, clock.wait_s(31)) == (4, math.inf)


def test_the_text_of_the_control_file_has_the_most_that_is_accepted() -> None:
    [file] = [file for file in FILES if file.name == "writeahead"]
    assert f"0 (none) to {MOST_PERCENT}." in file.help


@pytest.mark.parametrize(("text", "percent"), [("0", 0), ("25", 25), (" 40% ", 40), (str(MOST_PERCENT), MOST_PERCENT)])
def test_a_percentage_is_read(text: str, percent: int) -> None:
    assert parse_writeahead(text) == percent


@pytest.mark.parametrize(
    ("text", "error"), [("", BadValue), ("-1", BadValue), ("many", BadValue), ("91", OutOfRange), ("\u0665", BadValue)]
)
def test_what_is_no_percentage_is_refused(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        parse_writeahead(text)


@pytest.mark.parametrize(("text", "seconds"), [("0", 0), ("45", 45), ("2m", 120)])
def test_a_rest_is_read(text: str, seconds: float) -> None:
    assert parse_rest(text) == seconds


@pytest.mark.parametrize(("text", "error"), [("", BadValue), ("-1", BadValue), ("25h", BadValue), ("90000", OutOfRange)])
def test_what_is_no_rest_is_refused(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        parse_rest(text)
