"""The supervisor over workers that are played here: which deaths it follows with another worker, and what it tells that one.

Each test runs in a process of its own, as a supervisor takes over the signals. The end of a pipe plays /dev/fuse; a signal says
that the file system was unmounted.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.waiting import wait_until
from tmemfs.errors import Refused
from tmemfs.fuse.handling import IDLE
from tmemfs.holdings import Holdings
from tmemfs.options import Options
from tmemfs.supervisor import Supervisor
from tmemfs.system.memory import end_with_parent
from tmemfs.system.memory_safety import MemorySafety
from tmemfs.system.status_region import HANDLING, HAS_ANSWERED, State, StatusRegion, Word
from tmemfs.worker import Birth

Play = Callable[["Worker"], None]


class Worker:
    """What one played worker finds."""

    def __init__(self, words: memoryview, birth: Birth, announce: Callable[[], None], unmount: Callable[[], None]) -> None:
        self.words = words
        self.birth = birth
        self._announce = announce
        self._unmount = unmount

    def serve(self) -> None:
        """Say that the mount answers."""
        self.words[Word.IS_SERVING] = 1
        self._announce()

    def unmount(self) -> None:
        """End as after an unmount."""
        self._unmount()

    def die(self, number: int = signal.SIGKILL) -> None:
        """Be killed."""
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        while True:
            signal.pause()


def supervise(play: Play, watchdog_s: float = 0, prepare: Callable[[], None] = lambda: None) -> StatusRegion:
    """Run a supervisor of workers that `play` until one unmounts; its status region."""
    status = StatusRegion.create(None)
    ours, device = os.pipe()
    tester, child = os.getpid(), os.fork()
    if not child:
        code = 1
        try:
            end_with_parent(tester)
            _supervise(play, watchdog_s, prepare, status, ours, device)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(ours)
    os.close(device)
    assert os.waitpid(child, 0)[1] == 0
    return status


def _supervise(play: Play, watchdog_s: float, prepare: Callable[[], None], status: StatusRegion, kernel: int, device: int) -> None:
    parent, unmounted = os.getpid(), list[bool]()

    def unmount() -> None:
        os.kill(parent, signal.SIGUSR2)

    def run(options: Options, holdings: Holdings, safety: MemorySafety, birth: Birth, announce: Callable[[], None]) -> None:
        play(Worker(status.words, birth, announce, unmount))

    def refuse(_: Supervisor) -> None:
        status.words[Word.STATE] = State.GAVE_UP

    def keep_state(_: Supervisor) -> None:
        """Nothing was changed."""

    setattr(Supervisor, "_refuse", refuse)  # noqa: B010
    setattr(Supervisor, "_is_disconnected", lambda _: bool(unmounted))  # noqa: B010
    setattr(Supervisor, "_restore_settings", keep_state)  # noqa: B010
    setattr(Supervisor, "_unmount_at_last", keep_state)  # noqa: B010
    holdings = cast(Holdings, SimpleNamespace(device=SimpleNamespace(fd=device), status=status))
    listener, asker = socket.socketpair()  # nobody asks for an upgrade
    options = Options(Path("/nowhere"), 4096, watchdog_s=watchdog_s)
    made = Supervisor(options, holdings, MemorySafety(), listener, prepare, run, prepare=lambda holdings, safety: None)
    install = made._inbox.install

    def install_both() -> None:
        install()
        signal.signal(signal.SIGUSR2, lambda *_: unmounted.append(True))

    setattr(made._inbox, "install", install_both)  # noqa: B010
    with asker:
        made.run()


def serving(plays: dict[int, Play]) -> Play:
    """Workers that serve, play what stands at their generation, and unmount if nothing does."""

    def play(worker: Worker) -> None:
        worker.serve()
        plays.get(worker.birth.generation, Worker.unmount)(worker)

    return play


def test_idle_workers_may_be_killed_for_ever() -> None:
    def play(worker: Worker) -> None:
        worker.words[HANDLING] = IDLE
        worker.die()

    status = supervise(serving(dict.fromkeys(range(1, 13), play)))
    assert (status.words[Word.GENERATION], status.words[Word.DEATHS_KILLED]) == (13, 12)


@pytest.mark.parametrize("handled", [0, 6])
def test_workers_that_die_before_they_answer_end_the_restarts(handled: int) -> None:
    def play(worker: Worker) -> None:
        if worker.birth.generation == 1:
            worker.serve()
        worker.words[HANDLING] = handled
        worker.die(signal.SIGSEGV)

    status = supervise(play)
    assert status.words[Word.DEATHS_CRASHED] == 5


def test_idle_workers_that_crash_end_the_restarts() -> None:
    status = supervise(serving(dict.fromkeys(range(1, 99), lambda worker: worker.die(signal.SIGSEGV))))
    assert status.words[Word.STATE] in (State.GAVE_UP, State.ENDED) and status.words[Word.DEATHS_CRASHED] == 5


def test_one_that_answered_makes_up_for_those_before_it() -> None:
    def play(worker: Worker) -> None:
        worker.words[HANDLING] = 2 * worker.birth.generation
        worker.words[HAS_ANSWERED] = not worker.birth.generation % 5
        worker.die(signal.SIGSEGV)

    assert supervise(serving(dict.fromkeys(range(1, 9), play))).words[Word.GENERATION] == 9


def test_a_request_is_counted_against_for_a_crash_alone() -> None:
    def play(worker: Worker) -> None:
        worker.words[HANDLING + 2] = 6 | 1 << 63
        worker.die(signal.SIGKILL if worker.birth.generation == 2 else signal.SIGSEGV)

    def check(worker: Worker) -> None:
        assert worker.birth.suspects == {6: 2}
        worker.unmount()

    assert supervise(serving({1: play, 2: play, 3: play, 4: check})).words[Word.GENERATION] == 4


def test_a_worker_that_ends_as_if_after_an_unmount_is_replaced() -> None:
    status = supervise(serving({1: lambda worker: None}))
    assert (status.words[Word.GENERATION], status.deaths()[0].said.rpartition(") ")[2]) == (2, "ended with 0")


def test_a_first_worker_that_cannot_serve_is_refused_with_its_reason(capfd: pytest.CaptureFixture[str]) -> None:
    def play(worker: Worker) -> None:
        raise Refused("no threads")

    with pytest.raises(AssertionError):
        supervise(play)
    assert "Refused: no threads" in capfd.readouterr().err


def test_a_fork_that_fails_is_tried_again() -> None:
    real, failures = os.fork, [OSError("no memory")] * 3

    def fork() -> int:
        if failures:
            raise failures.pop()
        return real()

    def fail_from_now_on() -> None:
        setattr(os, "fork", fork)  # noqa: B010

    status = supervise(serving({1: Worker.die}), prepare=fail_from_now_on)
    assert status.words[Word.GENERATION] == 2


def test_calls_of_the_tier_end_with_their_worker() -> None:
    def play(worker: Worker) -> None:
        worker.words[Word.TIER_BEGUN] = 5
        worker.words[Word.TIER_ENDED] = 4
        worker.die()

    def check(worker: Worker) -> None:
        assert worker.words[Word.TIER_BEGUN] == worker.words[Word.TIER_ENDED]
        worker.unmount()

    assert supervise(serving({1: play, 2: check})).words[Word.GENERATION] == 2


def loop_for_ever() -> None:
    while True:
        time.sleep(0)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_one_that_hangs_is_replaced_and_the_next_is_told_where_it_was(is_stopped: bool) -> None:
    def play(worker: Worker) -> None:
        worker.words[HANDLING] = 6
        if is_stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        loop_for_ever()

    def check(worker: Worker) -> None:
        assert worker.words[Word.DEATHS_HUNG] == 1 and __file__ in worker.birth.last_words
        assert is_stopped or "loop_for_ever" in worker.birth.last_words
        worker.unmount()

    assert supervise(serving({1: play, 2: check}), watchdog_s=0.3).words[Word.GENERATION] == 2


def test_where_one_crashed_is_told_to_the_next() -> None:
    def play(worker: Worker) -> None:
        os.abort()

    def check(worker: Worker) -> None:
        assert "Aborted" in worker.birth.last_words and "in play" in worker.birth.last_words
        worker.unmount()

    assert supervise(serving({1: play, 2: check})).words[Word.GENERATION] == 2


def test_signals_wait_until_a_worker_serves_and_the_supervisor_sleeps_meanwhile() -> None:
    obeyed: list[int] = []

    def used_s(process: int) -> float:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def play(worker: Worker) -> None:
        signal.signal(signal.SIGTERM, lambda number, _: obeyed.append(number))
        if worker.birth.generation == 1:
            worker.serve()
            worker.die()
        os.kill(worker.birth.supervisor, signal.SIGTERM)
        before = used_s(worker.birth.supervisor)
        time.sleep(0.3)
        assert used_s(worker.birth.supervisor) - before < 0.1 and not obeyed
        worker.serve()
        wait_until(lambda: obeyed)
        worker.unmount()

    assert supervise(play).words[Word.GENERATION] == 2


def test_no_descriptor_is_left_of_those_that_died() -> None:
    def note(worker: Worker) -> None:
        worker.words[Word.REQUESTS] = len(os.listdir(f"/proc/{worker.birth.supervisor}/fd"))
        worker.die()

    def compare(worker: Worker) -> None:
        # At one of the two moments there may have been a spare, which takes a few.
        assert abs(worker.words[Word.REQUESTS] - len(os.listdir(f"/proc/{worker.birth.supervisor}/fd"))) < 8
        worker.unmount()

    plays: dict[int, Play] = {1: note, **dict.fromkeys(range(2, 51), Worker.die), 51: compare}
    assert supervise(serving(plays)).words[Word.GENERATION] == 51
