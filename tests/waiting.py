"""How tests wait: for what is to happen, however long it takes. No limit here measures anything: it only ends a test that hangs."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Final

import trio

#: Shorter than the limit of a whole test (pyproject.toml), so that a test that hangs says where.
HANG_S: Final = 240.0


def wait_until(condition: Callable[[], object], seconds: float = HANG_S) -> None:
    """Poll `condition` until it is true. Raises AssertionError after `seconds`, which only bound a hang."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def readable(fd: int, seconds: float = HANG_S) -> bool:
    """Whether there is something to read within `seconds`. Unlike select.select it takes descriptors of any number."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


async def until(condition: Callable[[], object]) -> None:
    """Poll `condition` in trio until it is true. Raises trio.TooSlowError after HANG_S."""
    with trio.fail_after(HANG_S):
        while not condition():
            await trio.sleep(0.005)
