"""The soak's own logic: what a seed chooses, what is counted, and what is a fault."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from tools.soak import __main__ as command
from tools.soak import places as places_module
from tools.soak.actions import Actions
from tools.soak.checks import faults_in_log, judge_events
from tools.soak.hogs import Hog, count_rounds
from tools.soak.places import Fault, Place, bounded, ended
from tools.soak.plan import KINDS, ORDINARY, PLACES, SETTINGS, SMALL, Action, actions, kinds
from tools.soak.readers import Readers
from tools.soak.summary import FLAT_BYTES, Growth, Summary


def first(count: int, seed: int, chosen: tuple[str, ...]) -> list[Action]:
    return list(islice(actions(seed, chosen), count))


def test_a_seed_fixes_what_is_done() -> None:
    assert first(200, 7, kinds()) == first(200, 7, kinds()) != first(200, 8, kinds())


def test_every_kind_comes_at_both_places_but_the_file_system_fills_at_the_small_one() -> None:
    chosen = first(3000, 1, kinds())
    assert {action.kind for action in chosen} == set(KINDS)
    for kind in KINDS:
        expected = {SMALL} if kind in ("fill", "free") else set(PLACES)
        assert {action.place for action in chosen if action.kind == kind} == expected


def test_every_setting_and_signal_comes() -> None:
    chosen = first(5000, 1, kinds())
    assert {(action.name, action.value) for action in chosen if action.name in SETTINGS} == {
        (name, value) for name, (_, values) in SETTINGS.items() for value in values
    }
    assert len({action.name for action in chosen if action.kind == "signals"}) == 9


def test_only_what_is_named_is_chosen() -> None:
    assert {action.kind for action in first(500, 1, kinds(["shrink", "codec"]))} == {"shrink", "codec"}
    assert "signals" not in kinds(without=["signals"]) and len(kinds(without=["signals"])) == len(KINDS) - 1


@pytest.mark.parametrize(("only", "without", "said"), [
    (["shrinks"], [], "no action shrinks: choose from shrink, "),
    ([], ["nothing"], "no action nothing"),
    (["shrink"], ["shrink"], "no action is left"),
])  # fmt: skip
def test_a_kind_that_there_is_not_is_refused(only: list[str], without: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        kinds(only, without)


def test_the_command_says_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--without", "signal"]) == 2
    assert "no action signal: choose from" in capsys.readouterr().err


def test_the_summary_says_what_was_counted() -> None:
    summary = Summary(5, seconds=61.2)
    summary.actions.update({"shrink": 2, "codec": 1})
    summary.daemon_ends({"stores": "5", "codec": "lz4"}, {"stores_refused": "1", "corrupt_records": "0"})
    summary.daemon_ends({"stores": "6", "loads_ram": "1"}, {"stores_refused": "2"})
    lines = summary.lines()
    assert lines[0] == "soak of 61 s, seed 5: passed"
    assert "actions: codec 1, shrink 2" in lines and "hogs: none" in lines
    assert "daemons: corrupt_records 0, loads_ram 1, stores 11, stores_refused 3" in lines


def test_a_summary_with_a_fault_is_no_success() -> None:
    lines = Summary(5, faults=["a page was wrong"]).lines()
    assert lines[0].endswith("FAILED") and lines[-1] == "FAULT: a page was wrong"


def grown(late: int, seconds: int = 1000) -> Growth:
    growth = Growth(1)
    for at in range(seconds):
        growth.sample(float(at), 20_000_000 + (late if at > seconds // 2 else 0))
    return growth


def test_memory_that_grows_beyond_its_bound_is_not_flat() -> None:
    assert grown(0).judge()[1] and grown(FLAT_BYTES).judge()[1]
    text, is_flat = grown(FLAT_BYTES + 1).judge()
    assert not is_flat and text.startswith("20.0 MB after a quarter of its life, 28.4 MB at the end")


def test_one_sample_out_of_line_says_nothing() -> None:
    growth = grown(0)
    growth.sample(1000.0, 1 << 30)
    assert growth.judge()[1]


@pytest.mark.parametrize("growth", [Growth(1), grown(1 << 30, 50)])
def test_a_short_life_is_not_judged(growth: Growth) -> None:
    assert growth.judge() == ("too short a life to tell", True)


def test_rounds_of_a_hog_are_added_up_and_other_lines_kept() -> None:
    counts = Counter[str]()
    rest = count_rounds(['{"verified": 10, "wrong": 0}', '{"verified": 5, "wrong": 1}', "MemoryError", '{"verif'], counts)
    assert (counts["rounds"], counts["pages verified"], counts["pages wrong"]) == (2, 15, 1)
    assert rest == ["MemoryError", '{"verif']


class Tasks:
    """A cgroup that takes anybody."""

    def __init__(self, directory: Path) -> None:
        self.tasks = directory / "tasks"


@pytest.fixture
def hog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hog]:
    """A hog of the size of a few pages."""
    monkeypatch.setattr("tools.soak.hogs._SIZE", "256K")
    made = Hog("tested", Tasks(tmp_path), tmp_path, 1, Counter())  # type: ignore[arg-type]
    yield made
    made.kill()


def end_by(hog: Hog, number: signal.Signals) -> None:
    assert hog._run is not None
    hog._run.process.send_signal(number)
    hog._run.process.wait()


def test_a_hog_that_is_told_to_stop_has_verified_all_it_has(hog: Hog) -> None:
    hog.start(0)
    hog.stop(0)
    assert hog._counts["rounds"] >= 1 and hog._counts["pages verified"] >= 64 and hog._counts["pages wrong"] == 0


def test_a_hog_that_was_killed_where_a_store_was_full_is_counted_and_started_again(hog: Hog) -> None:
    hog.start(3)
    hog.check(3)
    end_by(hog, signal.SIGKILL)
    hog.check(4)
    assert hog._counts["killed where a store was full"] == 1 and hog._counts["started"] == 2


@pytest.mark.parametrize(("number", "refused"), [(signal.SIGKILL, 3), (signal.SIGBUS, 9)])
def test_a_hog_that_ends_in_any_other_way_is_a_fault(hog: Hog, number: signal.Signals, refused: int) -> None:
    hog.start(3)
    end_by(hog, number)
    with pytest.raises(Fault, match=f"ended with {number.name}"):
        hog.check(refused)


@pytest.mark.parametrize(("name", "events", "is_fault"), [
    (SMALL, {"write_errors": "3", "corrupt_records": "0"}, False),
    (ORDINARY, {"write_errors": "3"}, True),
    (SMALL, {"corrupt_records": "1"}, True),
    (ORDINARY, {"read_errors": "1"}, True),
    (ORDINARY, {"stores_refused": "99"}, False),
])  # fmt: skip
def test_what_may_never_be_counted_is_a_fault(name: str, events: dict[str, str], is_fault: bool) -> None:
    if is_fault:
        with pytest.raises(Fault, match=f"{name} counts"):
            judge_events(name, events)
    else:
        judge_events(name, events)


def test_a_trace_in_a_log_is_a_fault() -> None:
    assert not faults_in_log(SMALL, "one\ntwo\n")
    [fault] = faults_in_log(SMALL, "before\nERROR job failed\nTraceback (most recent call last):\n  KeyError: 1\n")
    assert fault == "the log of small: ERROR job failed / Traceback (most recent call last): /   KeyError: 1"


class Scripted(Place):
    """A place whose writes fail with `number`."""

    number = 0

    def write(self, name: str, value: str) -> None:
        if self.number:
            raise OSError(self.number, "injected")


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[tuple[Scripted, Actions, Summary]]:
    summary = Summary(1)
    place = Scripted(SMALL, tmp_path)
    yield place, Actions({SMALL: place}, Readers(), summary), summary
    Scripted.number = 0


def test_an_answer_that_is_allowed_is_counted(scripted: tuple[Scripted, Actions, Summary]) -> None:
    _, performed, summary = scripted
    Scripted.number = errno.EAGAIN
    performed.perform(Action("shrink", SMALL, "shrink", "all"))
    assert summary.answers == {"shrink EAGAIN": 1} and summary.actions == {"shrink": 1}


@pytest.mark.parametrize(("name", "number"), [("shrink", errno.EIO), ("codec", errno.EAGAIN), ("pool.max", errno.ENOTCONN)])
def test_an_answer_that_is_not_allowed_is_a_fault(scripted: tuple[Scripted, Actions, Summary], name: str, number: int) -> None:
    _, performed, _ = scripted
    Scripted.number = number
    with pytest.raises(Fault, match="injected"):
        performed.perform(Action("shrink", SMALL, name, "1"))


def test_a_call_that_does_not_end_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("injected")

    assert bounded("adding", lambda: 1 + 1) == 2
    with pytest.raises(OSError, match="injected"):
        bounded("failing", fail)
    monkeypatch.setattr(places_module, "HANG_S", 0.01)
    with pytest.raises(Fault, match="waiting did not end"):
        bounded("waiting", lambda: time.sleep(0.5))


def test_a_command_that_shows_a_traceback_is_a_fault() -> None:
    process = subprocess.Popen([sys.executable, "-c", "1 / 0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with pytest.raises(Fault, match="ZeroDivisionError"):
        ended(process)
