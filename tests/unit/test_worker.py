"""A worker: calls in order, in one thread, whose errors come back, and which nothing cuts short."""

from __future__ import annotations

import threading
import time

import pytest
import trio

from tmemfs.engine.worker import Worker


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


async def test_closing_ends_the_thread_after_what_was_asked(worker: Worker) -> None:
    assert "tested" in _threads()
    worker.close()
    with trio.fail_after(5):
        while "tested" in _threads():
            await trio.sleep(0.001)


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}
