"""Free frames: where stores that found the pool full wait until the shrinker has freed a frame.

The store's notices signal it whenever a frame may have become free. While the shrinker cannot free any (the backing is full, or
fails), it sets `stuck`, and every waiting store is refused: the page stays where it was.

Thread-safety: all methods from any thread. `signal` is called under the store's lock, so nothing here calls the store.

Invariant: 1. A signal between a failed attempt and the wait that follows it is never lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from tmemfs.errors import NoSpace

#: A wait ends after this long at the latest, to try again; signals end it far earlier.
_RETRY_S: Final = 1.0


class FreeFrames:
    """What stores wait at for a free frame."""

    def __init__(self) -> None:
        # guarded by the condition's lock
        self._changed = threading.Condition()
        self._generation = 0
        self._stuck: str | None = None
        self._are_left = False

    @property
    def stuck(self) -> str | None:
        """Why no frame can be freed now, or None."""
        return self._stuck

    def signal(self) -> None:
        """Frames may have become free: let the stores that wait try again."""
        with self._changed:
            self._generation += 1
            # All of them: for which of the stores the frames suffice, only the attempts tell.
            self._changed.notify_all()

    def set_stuck(self, reason: str | None) -> None:
        """No frame can be freed, because of `reason`; None: frames can be freed again."""
        with self._changed:
            self._stuck = None if self._are_left else reason
            self._generation += 1
            self._changed.notify_all()

    def leave_waiting(self) -> None:
        """Refuse no store from now on: this process ends before the mount does, and the next one takes up what waits here."""
        with self._changed:
            self._are_left = True
            self._stuck = None

    def wait_until(self, attempt: Callable[[], bool]) -> None:
        """Call `attempt` until it succeeds, waiting for a free frame in between. Raises NoSpace when none can be freed."""
        while True:
            # Read before the attempt and compared in the wait: a signal that comes between the two ends the wait at once. The
            # attempt itself takes the store's lock, under which `signal` is called, so it cannot be made while this lock is held.
            with self._changed:
                seen = self._generation
            if attempt():
                return
            with self._changed:
                if self._stuck is not None:
                    raise NoSpace(self._stuck)
                self._changed.wait_for(lambda seen=seen: self._generation != seen, _RETRY_S)  # type: ignore[misc]
