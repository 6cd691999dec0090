"""Stop: how work on request ends early, because its deadline passed or because nobody waits for it any more.

The work is done in threads, which cannot be cancelled. They ask between two steps, each of which leaves everything consistent. The
task that waits in trio may be cancelled. Then the work is told, and the task still waits for it, so that its answer says how far it
came.

Thread-safety: `stop` and `check` from any thread; `finish` in trio.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import outcome
import trio

T = TypeVar("T")

INTERRUPTED: Final = "interrupted"
DEADLINE_PASSED: Final = "the deadline passed"


class Stopped(Exception):  # not an error: what was asked for is not wanted any more
    """The work is to end; the message says why."""


class Stop:
    """Whether work that may take `deadline_s` seconds, from now on, is to end."""

    def __init__(self, deadline_s: float = math.inf) -> None:
        self._ends_at = time.monotonic() + deadline_s
        self._is_interrupted = False

    def stop(self) -> None:
        """Nobody waits for the work any more."""
        self._is_interrupted = True

    @property
    def reason(self) -> str | None:
        """Why the work is to end now, or None."""
        if self._is_interrupted:
            return INTERRUPTED
        return DEADLINE_PASSED if time.monotonic() >= self._ends_at else None

    def check(self) -> None:
        """Raise Stopped if the work is to end."""
        if reason := self.reason:
            raise Stopped(reason)


async def finish(work: Callable[[], Awaitable[T]], stop: Callable[[], object]) -> T:
    """What `work` gives. If the caller is cancelled meanwhile, `stop` is called and `work` is finished before that counts."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_stop_when_cancelled, stop)
        # Shielded, for the threads that work cannot be cancelled: a caller that went on would leave them with plans of the store.
        with trio.CancelScope(shield=True):
            result = await outcome.acapture(work)  # captured: an error must not cancel the nursery before it is unwrapped
        nursery.cancel_scope.cancel()
    return result.unwrap()


async def _stop_when_cancelled(stop: Callable[[], object]) -> None:
    try:
        await trio.sleep_forever()
    finally:  # also after the work has ended: then stopping it does nothing
        stop()
