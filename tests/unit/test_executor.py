"""A worker: calls in order, in one thread, whose errors come back, and which nothing cuts short."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest
import trio

from tests.waiting import HANG_S
from tmemfs.jobs import executor as worker_module
from tmemfs.jobs.executor import Worker


@pytest.fixture
def worker() -> Worker:
    return Worker("tested")


async def test_calls_are_done_in_one_thread_in_order_of_arrival(worker: Worker) -> None:
    done: list[tuple[int, str]] = []
    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(worker.run, lambda number=number: done.append((number, threading.current_thread().name)))
            await trio.lowlevel.checkpoint()
    assert done == [(number, "tested") for number in range(5)]
    worker.close()


async def test_an_error_is_raised_where_it_was_called_and_the_next_call_is_done(worker: Worker) -> None:
    def fail() -> None:
        raise ValueError("injected")

    with pytest.raises(ValueError, match="injected"):
        await worker.run(fail)
    done: list[int] = []
    await worker.run(lambda: done.append(1))
    assert done == [1]
    worker.close()


async def test_a_call_that_is_cancelled_ends_first(worker: Worker) -> None:
    ended = threading.Event()

    def slow() -> None:
        time.sleep(0.05)
        ended.set()

    with trio.move_on_after(0.01):
        await worker.run(slow)
    assert ended.is_set()
    worker.close()


async def test_closing_ends_the_threads_after_what_was_asked() -> None:
    worker = Worker("closed", threads=2)
    worker.start()
    assert _threads().count("closed") == 2
    worker.close()
    await _until_ended("closed")


async def test_the_threads_end_with_the_worker_that_nobody_refers_to_any_more() -> None:
    worker = Worker("forgotten")
    worker.start()
    del worker
    await _until_ended("forgotten")


async def test_no_thread_is_created_by_a_call_of_a_worker_that_was_started(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.start()
    monkeypatch.setattr(threading.Thread, "start", _refuse)
    assert await worker.run(lambda: 7) == 7


def test_a_thread_survives_an_event_loop_that_ended_before_the_call(worker: Worker) -> None:
    """The loop may fail while a call is under way; the next one finds the thread as it was."""
    begin, end = threading.Event(), threading.Event()

    async def leave_a_call() -> None:
        finish = partial(trio.lowlevel.current_trio_token().run_sync_soon, begin.set)
        worker._calls.put(worker_module._Call[object](partial(end.wait, HANG_S), finish))

    worker.start()
    trio.run(leave_a_call)
    end.set()  # its end is told to a loop that has ended
    assert trio.run(worker.run, lambda: 8) == 8 and not begin.is_set()


def _refuse(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


async def _until_ended(name: str) -> None:
    with trio.fail_after(HANG_S):
        while name in _threads():
            await trio.sleep(0.001)


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_a_thread_that_could_not_be_prepared_takes_calls_all_the_same(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise MemoryError

    monkeypatch.setattr(worker_module, "prepare_thread", fail)
    worker.start()
    assert trio.run(worker.run, lambda: 9) == 9
