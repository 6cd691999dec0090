"""An executor: calls in order, in one thread, whose errors come back, and which nothing cuts short."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest
import trio

from tests.waiting import HANG_S
from tmemfs.jobs import executor as executor_module
from tmemfs.jobs.executor import Executor


@pytest.fixture
def executor() -> Executor:
    return Executor("tested")


async def test_calls_are_done_in_one_thread_in_order_of_arrival(executor: Executor) -> None:
    done: list[tuple[int, str]] = []
    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(executor.run, lambda number=number: done.append((number, threading.current_thread().name)))
            await trio.lowlevel.checkpoint()
    assert done == [(number, "tested") for number in range(5)]
    executor.close()


async def test_an_error_is_raised_where_it_was_called_and_the_next_call_is_done(executor: Executor) -> None:
    def fail() -> None:
        raise ValueError("injected")

    with pytest.raises(ValueError, match="injected"):
        await executor.run(fail)
    done: list[int] = []
    await executor.run(lambda: done.append(1))
    assert done == [1]
    executor.close()


async def test_a_call_that_is_cancelled_ends_first(executor: Executor) -> None:
    ended = threading.Event()

    def slow() -> None:
        time.sleep(0.05)
        ended.set()

    with trio.move_on_after(0.01):
        await executor.run(slow)
    assert ended.is_set()
    executor.close()


async def test_closing_ends_the_threads_after_what_was_asked() -> None:
    executor = Executor("closed", threads=2)
    executor.start()
    assert _threads().count("closed") == 2
    executor.close()
    await _until_ended("closed")


async def test_the_threads_end_with_the_executor_that_nobody_refers_to_any_more() -> None:
    executor = Executor("forgotten")
    executor.start()
    del executor
    await _until_ended("forgotten")


async def test_no_thread_is_created_by_a_call_of_an_executor_that_was_started(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor.start()
    monkeypatch.setattr(threading.Thread, "start", _refuse)
    assert await executor.run(lambda: 7) == 7


def test_a_thread_survives_an_event_loop_that_ended_before_the_call(executor: Executor) -> None:
    """The loop may fail while a call is under way; the next one finds the thread as it was."""
    begin, end = threading.Event(), threading.Event()

    async def leave_a_call() -> None:
        finish = partial(trio.lowlevel.current_trio_token().run_sync_soon, begin.set)
        executor._calls.put(executor_module._Call[object](partial(end.wait, HANG_S), finish))

    executor.start()
    trio.run(leave_a_call)
    end.set()  # its end is told to a loop that has ended
    assert trio.run(executor.run, lambda: 8) == 8 and not begin.is_set()


def _refuse(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


async def _until_ended(name: str) -> None:
    with trio.fail_after(HANG_S):
        while name in _threads():
            await trio.sleep(0.001)


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_a_thread_that_could_not_be_prepared_takes_calls_all_the_same(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise MemoryError

    monkeypatch.setattr(executor_module, "prepare_thread", fail)
    executor.start()
    assert trio.run(executor.run, lambda: 9) == 9
