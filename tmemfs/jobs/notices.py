"""Notices: how the store, which knows neither trio nor the jobs, says that there may be work for them.

The store calls `Notices` whenever frames were taken or became free, or a segment became sparse or empty: under its lock, and from
any thread. Stores that wait for a frame are woken at once if one may have become free. A store whose attempt fails gives a notice,
too; that notice must not wake the stores that wait, or a failing store would wake itself for ever. Tasks in trio are woken by a
call that runs in trio's thread. Such a call costs more than what most notices are about, so one that is pending stands for all that
follow it, until the shrinker looks at the store again.

The jobs and the store share this object, so it is made before either of them.

Invariants:
1. Calling it returns at once and calls nothing of the store.
2. A task that clears its wakeup before it looks at the store misses nothing that happens after the look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import trio

from tmemfs.pages.free_frames import FreeFrames


class Wakeup:
    """What one task waits for between two looks. In trio's thread."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def set(self) -> None:
        """Wake the task, or have its next wait end at once."""
        self._event.set()

    def clear(self) -> None:
        """To be called before each look: what was told before is seen by it."""
        self._event = trio.Event()

    async def wait(self) -> None:
        """Wait until it was set since the last `clear`."""
        await self._event.wait()


class Notices:
    """Wakes `free_frames` and the tasks of the jobs. Callable from any thread; the rest in trio's thread."""

    def __init__(self, free_frames: FreeFrames) -> None:
        self.shrinker = Wakeup()
        #: For who waits for a frame, and for nothing else.
        self.frame = Wakeup()
        self.reserve = Wakeup()
        self.cleaner = Wakeup()
        self.write_ahead = Wakeup()
        self.pressure = Wakeup()
        self._free_frames = free_frames
        self._is_pending = False
        self._wake_in_trio: Callable[[], None] = _nobody

    def __call__(self, frame_freed: bool = True) -> None:
        """There may be work. `frame_freed`: a frame may have become free.

        Two threads that both find nothing pending both have trio woken, which does no harm.
        """
        if frame_freed:
            self._free_frames.signal()  # each time: a store that waits must not depend on what trio has seen
        if not self._is_pending:
            self._is_pending = True
            self._wake_in_trio()

    @contextmanager
    def delivered(self) -> Iterator[None]:
        """While the shrinker runs, notices reach the tasks in trio."""
        self._wake_in_trio = partial(_run_soon, trio.lowlevel.current_trio_token(), self._wake)
        try:
            yield
        finally:
            self._wake_in_trio = _nobody

    def rearm(self) -> None:
        """The shrinker is about to look at the store: a notice after this wakes trio again, one before it is seen by the look."""
        self._is_pending = False

    def _wake(self) -> None:
        for wakeup in (self.shrinker, self.frame, self.reserve, self.pressure):
            wakeup.set()


def _nobody() -> None:
    """No task runs that could be woken."""


def _run_soon(token: trio.lowlevel.TrioToken, wake: Callable[[], None]) -> None:
    with suppress(trio.RunFinishedError):  # a store must not fail because the event loop has ended meanwhile
        token.run_sync_soon(wake)
