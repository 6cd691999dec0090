"""Stores that wait for a free frame: refused when none can be freed, and left waiting where another process goes on."""

from __future__ import annotations

import threading

import pytest

from tests.waiting import wait_until
from tmemfs.errors import NoSpace
from tmemfs.pages.free_frames import FreeFrames


def test_a_store_that_waits_is_refused_when_no_frame_can_be_freed() -> None:
    frames = FreeFrames()
    frames.set_stuck("the disk is full")
    with pytest.raises(NoSpace, match="the disk is full"):
        frames.wait_until(lambda: False)


def test_a_store_that_is_left_waiting_is_not_refused_whatever_becomes_of_the_shrinker() -> None:
    frames, attempts, is_free = FreeFrames(), list[bool](), threading.Event()

    def attempt() -> bool:
        attempts.append(is_free.is_set())
        return attempts[-1]

    store = threading.Thread(target=frames.wait_until, args=(attempt,))
    store.start()
    wait_until(lambda: attempts)
    frames.leave_waiting()
    seen = len(attempts)
    frames.set_stuck("the shrinker is not running")
    assert frames.stuck is None
    wait_until(lambda: len(attempts) > seen)  # it was woken, and waits again
    is_free.set()
    frames.signal()
    store.join()
    assert attempts[-1] and not any(attempts[:-1])
