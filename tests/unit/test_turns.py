"""Turns: one leads, work is done by whoever left with it, and what comes while all others are away is not forgotten."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import pytest

from tmemfs.fuse.turns import Turns

THREADS = 4


class Crew:
    """Threads that take turns at reading numbers: negative ones may block, until `go`; None ends it."""

    def __init__(self) -> None:
        self.turns: Turns[int] = Turns(THREADS)
        self.requests: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.answered: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self.go = threading.Semaphore(0)
        self.leading = 0
        self.most_leading = 0
        self.threads = [threading.Thread(target=self._work, name=f"one-{n}", daemon=True) for n in range(THREADS)]
        for thread in self.threads:
            thread.start()

    def _work(self) -> None:
        self.turns.take(self._lead, self._do)

    def _lead(self) -> int | None:
        self.leading += 1
        self.most_leading = max(self.most_leading, self.leading)
        while (request := self.requests.get()) is not None:
            if request >= 0:
                self.answered.put((request, threading.current_thread().name))
                continue
            self.leading -= 1
            if self.turns.leave_with(request):
                return request
            self.leading += 1
        self.leading -= 1
        return None

    def _do(self, work: int) -> None:
        self.go.acquire()
        self.answered.put((work, threading.current_thread().name))

    def ask(self, *requests: int | None) -> None:
        for request in requests:
            self.requests.put(request)

    def answers(self, count: int) -> list[int]:
        return [self.answered.get(timeout=5)[0] for _ in range(count)]

    def end(self) -> None:
        self.go.release(100)
        self.ask(None)
        for thread in self.threads:
            thread.join(5)
        assert not any(thread.is_alive() for thread in self.threads)


@pytest.fixture
def crew() -> Crew:
    return Crew()


def test_what_can_be_answered_at_once_is_answered_by_one_thread(crew: Crew) -> None:
    crew.ask(*range(50))
    answers = [crew.answered.get(timeout=5) for _ in range(50)]
    assert [number for number, _ in answers] == list(range(50)) and len({name for _, name in answers}) == 1
    crew.end()


def test_work_that_blocks_holds_nobody_up(crew: Crew) -> None:
    crew.ask(-1, 1, -2, 2, -3, 3)
    assert crew.answers(3) == [1, 2, 3]
    crew.go.release(3)
    assert sorted(crew.answers(3)) == [-3, -2, -1]
    crew.end()


def test_more_work_than_threads_still_leaves_one_to_lead_and_is_done_after(crew: Crew) -> None:
    crew.ask(*range(-20, 0), 7)
    assert crew.answers(1) == [7]
    crew.go.release(20)
    assert sorted(crew.answers(20)) == list(range(-20, 0))
    crew.ask(8)
    assert crew.answers(1) == [8]
    crew.end()


def test_only_one_leads_at_any_time(crew: Crew) -> None:
    crew.go.release(1000)
    crew.ask(*(number if number % 3 else -number for number in range(1, 600)))
    assert len(crew.answers(599)) == 599 and crew.most_leading == 1
    crew.end()


def test_work_that_was_left_with_is_finished_also_at_the_end(crew: Crew) -> None:
    crew.ask(*range(-6, 0), None)
    crew.go.release(6)
    assert sorted(crew.answers(6)) == list(range(-6, 0))
    crew.end()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_leader_that_fails_ends_it_for_all() -> None:
    turns: Turns[int] = Turns(THREADS)

    def fail() -> int | None:
        raise RuntimeError("a bug")

    do: Callable[[int], None] = print
    threads = [threading.Thread(target=turns.take, args=(fail, do), daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)
