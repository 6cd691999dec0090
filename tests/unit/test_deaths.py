"""What a supervisor makes of the deaths of its workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from tmemfs.deaths import MOST_DEATHS_IN_A_ROW, Deaths
from tmemfs.fuse.handling import IDLE
from tmemfs.fuse.wire import RESENT
from tmemfs.system.status_region import HANDLING, HAS_ANSWERED, StatusRegion, Word

KILLED, ABORTED, FAILED = 9, 6, 1 << 8


@pytest.fixture
def status() -> Iterator[StatusRegion]:
    with closing(StatusRegion.create(None)) as status:
        yield status


def test_deaths_are_counted_by_cause(status: StatusRegion) -> None:
    deaths = Deaths(status)
    deaths.note(10, KILLED, "", "", False)
    deaths.note(11, ABORTED, "", "", False)
    deaths.note(12, FAILED, "", "no threads", False)
    deaths.note(13, KILLED, "no request was answered for 30.0 s", "", False)
    counts = (Word.DEATHS, Word.DEATHS_KILLED, Word.DEATHS_CRASHED, Word.DEATHS_HUNG)
    assert [status.words[word] for word in counts] == [4, 1, 2, 1]
    assert [death.said.partition(") ")[2] for death in status.deaths()] == [
        "was ended by SIGKILL",
        "was ended by SIGABRT",
        "ended with 1: no threads",
        "was killed, as no request was answered for 30.0 s",
    ]


def test_what_was_handled_is_suspected_unless_the_worker_was_killed_from_outside(status: StatusRegion) -> None:
    deaths = Deaths(status)
    status.words[HANDLING], status.words[HANDLING + 1] = 8 | RESENT, 6 | IDLE
    deaths.note(10, KILLED, "", "", False)
    assert deaths.suspects == {}
    deaths.note(11, ABORTED, "", "", False)
    status.words[HANDLING] = 8
    deaths.note(12, KILLED, "it hung", "", False)
    assert deaths.suspects == {8: 2}


def test_workers_that_answer_nothing_are_too_many_and_one_that_answers_makes_up_for_them(status: StatusRegion) -> None:
    deaths = Deaths(status)
    for _ in range(MOST_DEATHS_IN_A_ROW - 1):
        deaths.note(10, ABORTED, "", "", True)
    status.words[HANDLING], status.words[HAS_ANSWERED] = 8, 1
    deaths.note(11, ABORTED, "", "", True)
    status.words[HAS_ANSWERED] = 0
    for _ in range(MOST_DEATHS_IN_A_ROW):
        assert not deaths.are_too_many
        deaths.note(12, ABORTED, "", "", True)
    assert deaths.are_too_many


def test_workers_without_anything_to_answer_may_die_as_often_as_they_like(status: StatusRegion) -> None:
    deaths = Deaths(status)
    status.words[Word.IS_SERVING] = 1
    for _ in range(2 * MOST_DEATHS_IN_A_ROW):
        deaths.note(10, KILLED, "", "", False)
    assert not deaths.are_too_many
