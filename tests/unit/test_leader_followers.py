"""One thread leads, also while it does work, but not for long; what comes while all others are away is not forgotten."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from tests.waiting import HANG_S
from tmemfs.fuse import leader_followers
from tmemfs.fuse.leader_followers import HAND_OVERS_AFTER_WAIT, WATCH_PERIOD_S, LeaderFollowers

THREADS = 4
#: Work from here on is known to be long.
LONG = -1000


class Crew:
    """Threads that take turns at reading numbers: negative ones may block, until `go`; None ends it."""

    def __init__(self, watch_period_s: float = WATCH_PERIOD_S) -> None:
        self.has_requests = False
        self.roles = LeaderFollowers(THREADS, lambda: self.has_requests, watch_period_s)
        self.requests: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.answered: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self.go = threading.Semaphore(0)
        self.working: set[str] = set()
        self.leading = 0
        self.most_leading = 0
        self.threads = [threading.Thread(target=self._work, name=f"one-{n}", daemon=True) for n in range(THREADS)]
        self.threads.append(threading.Thread(target=self.roles.watch, daemon=True))
        for thread in self.threads:
            thread.start()

    def _work(self) -> None:
        self.roles.serve(self._lead)

    def _lead(self) -> bool:
        while True:
            self.leading += 1
            self.most_leading = max(self.most_leading, self.leading)
            request = self.requests.get()
            self.leading -= 1
            if request is None:
                return True
            if request >= 0:
                self.answered.put((request, threading.current_thread().name))
            elif not self.roles.do(partial(self._do, request), request <= LONG):
                return False

    def _do(self, work: int) -> None:
        self.working.add(threading.current_thread().name)
        self.go.acquire()
        self.answered.put((work, threading.current_thread().name))

    def ask(self, *requests: int | None) -> None:
        for request in requests:
            self.requests.put(request)

    def answers(self, count: int) -> list[int]:
        return [self.answered.get(timeout=HANG_S)[0] for _ in range(count)]

    def names(self, count: int) -> set[str]:
        return {self.answered.get(timeout=HANG_S)[1] for _ in range(count)}

    def end(self) -> None:
        self.go.release(1000)
        self.ask(None)
        for thread in self.threads:
            thread.join(HANG_S)
        assert not any(thread.is_alive() for thread in self.threads)


@pytest.fixture
def crew() -> Iterator[Crew]:
    made = Crew()
    yield made
    made.end()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    """Nobody takes the lead from who keeps it, and no work is slow."""
    monkeypatch.setattr(leader_followers, "SLOW_S", 10 * HANG_S)
    made = Crew(watch_period_s=10 * HANG_S)
    yield made
    made.end()


def test_what_can_be_answered_at_once_is_answered_by_one_thread(crew: Crew) -> None:
    crew.ask(*range(50))
    answers = [crew.answered.get(timeout=HANG_S) for _ in range(50)]
    assert [number for number, _ in answers] == list(range(50)) and len({name for _, name in answers}) == 1


def test_work_that_is_quick_is_done_by_who_leads(patient: Crew) -> None:
    patient.go.release(20)
    patient.ask(*range(-20, 20))
    assert len(patient.names(40)) == 1


def test_work_that_blocks_holds_nobody_up_for_long(crew: Crew) -> None:
    crew.ask(-1, 1, -2, 2, -3, 3)
    assert crew.answers(3) == [1, 2, 3]
    crew.go.release(3)
    assert sorted(crew.answers(3)) == [-3, -2, -1]


def test_one_whose_lead_was_taken_may_lead_again(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader_followers, "HAND_OVERS_AFTER_SLOW", 0)
    for _ in range(3 * THREADS):
        crew.ask(-1, 1)
        assert crew.answers(1) == [1]
        crew.go.release()
        assert crew.answers(1) == [-1]
    assert len(crew.working) > 1 and crew.most_leading == 1


def test_one_whose_lead_was_taken_leaves_the_next_one_s_alone(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes back while another one keeps the lead for work of its own."""
    monkeypatch.setattr(leader_followers, "HAND_OVERS_AFTER_SLOW", 0)
    crew.ask(-1, 1)
    assert crew.answers(1) == [1]
    before = len(crew.working)
    crew.ask(-2)
    while len(crew.working) == before:
        time.sleep(0.0001)
    crew.go.release(2)
    assert sorted(crew.answers(2)) == [-2, -1]
    crew.ask(*range(20))
    assert len(crew.names(20)) == 1 and crew.most_leading == 1


def test_after_requests_were_found_waiting_the_lead_is_handed_on_beforehand(patient: Crew) -> None:
    patient.go.release()
    patient.has_requests = True
    patient.ask(-1, 0)
    assert patient.answers(2) == [-1, 0]
    patient.has_requests = False
    for number in range(HAND_OVERS_AFTER_WAIT):
        patient.ask(-2, number)
        assert patient.answers(1) == [number]
        patient.go.release()
        assert patient.answers(1) == [-2]
    patient.go.release(20)
    patient.ask(*range(-20, 0))
    assert len(patient.names(20)) == 1


def test_after_work_that_was_slow_the_lead_is_handed_on_beforehand(patient: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader_followers, "SLOW_S", 0.0)
    patient.go.release()
    patient.ask(-1, 0)
    assert patient.answers(2) == [-1, 0]
    patient.ask(-2, 1)
    assert patient.answers(1) == [1]


def test_work_that_is_known_to_be_long_is_not_begun_with_the_lead(patient: Crew) -> None:
    patient.ask(LONG, 1, LONG - 1, 2)
    assert patient.answers(2) == [1, 2]


def test_more_work_than_threads_still_leaves_one_to_lead_and_is_done_after(crew: Crew) -> None:
    crew.ask(*range(-20, 0), 7)
    assert crew.answers(1) == [7]
    crew.go.release(20)
    assert sorted(crew.answers(20)) == list(range(-20, 0))
    crew.ask(8)
    assert crew.answers(1) == [8]


def test_only_one_leads_at_any_time(crew: Crew) -> None:
    crew.has_requests = True
    crew.go.release(1000)
    crew.ask(*(number if number % 3 else -number for number in range(1, 600)))
    assert len(crew.answers(599)) == 599 and crew.most_leading == 1


def test_the_watch_sleeps_while_nobody_keeps_the_lead(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader_followers, "SLOW_S", 10 * HANG_S)
    crew.go.release()
    crew.ask(-1)
    assert crew.answers(1) == [-1]
    deadline = time.monotonic() + HANG_S
    while crew.roles.is_watching and time.monotonic() < deadline:
        time.sleep(WATCH_PERIOD_S)
    assert not crew.roles.is_watching
    crew.ask(-1, 1)  # and is there again
    assert crew.answers(1) == [1]


def test_work_that_was_left_with_is_finished_also_at_the_end(crew: Crew) -> None:
    crew.ask(*range(-6, 0), None)
    crew.go.release(6)
    assert sorted(crew.answers(6)) == list(range(-6, 0))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_leader_that_fails_ends_it_for_all() -> None:
    made = LeaderFollowers(THREADS, lambda: False)

    def fail() -> bool:
        raise RuntimeError("a bug")

    threads = [threading.Thread(target=made.serve, args=(fail,), daemon=True) for _ in range(THREADS)]
    threads.append(threading.Thread(target=made.watch, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert not any(thread.is_alive() for thread in threads)
