"""FreeFrames: where stores that found the pool full wait for the shrinker.

The store's `notice` signals it whenever frames may have become free; the shrinker sets `stuck` while it cannot make room (the
backing is full, or fails), and every waiting store is refused then: the page stays where it was.

Thread-safety: all methods from any thread. `signal` is called under the store's lock, so nothing here calls the store.

Invariant: 1. A signal between a failed attempt and the wait that follows it is never lost (the generation tells).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from tmemfs.errors import NoRoom

#: A wait ends after this long at the latest, to look again; signals end it far earlier.
_LOOK_AGAIN_S: Final = 1.0


class FreeFrames:
    """A place to wait for room."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._generation = 0
        self._stuck: str | None = None

    @property
    def stuck(self) -> str | None:
        """Why no room can be made now, or None."""
        return self._stuck

    def signal(self) -> None:
        """Frames may have become free: let those who wait look again."""
        with self._changed:
            self._generation += 1
            self._changed.notify_all()

    def set_stuck(self, reason: str | None) -> None:
        """No room can be made, because of `reason`; or it can again."""
        with self._changed:
            self._stuck = reason
            self._generation += 1
            self._changed.notify_all()

    def wait_until(self, attempt: Callable[[], bool]) -> None:
        """Call `attempt` until it succeeds, waiting for room in between. Raises NoRoom when there can be none."""
        while True:
            with self._changed:
                seen = self._generation
            if attempt():
                return
            with self._changed:
                if self._stuck is not None:
                    raise NoRoom(self._stuck)
                self._changed.wait_for(lambda seen=seen: self._generation != seen, _LOOK_AGAIN_S)  # type: ignore[misc]
