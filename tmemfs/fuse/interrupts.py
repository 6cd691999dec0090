"""Interrupts: which writes of control files no process waits for any more.

If a process gets a signal while it waits for the reply to a FUSE request, the kernel sends INTERRUPT with the request's `unique`,
and the process waits on, also if it is killed. So a write that takes long has to end then. pyfuse3 passes on neither INTERRUPT nor
`unique`. The relay sees both, and knows a write by the handle that it writes to.

    relay   a write is passed on to pyfuse3    began(unique, handle)
            INTERRUPT                          interrupt(unique), then `tell` the namespace, in trio's thread
            the reply                          ended(unique)
    trio    a write begins                     is_interrupted(handle): INTERRUPT may have come before it did

If two writes to one handle are under way, both end when one is interrupted: a handle does not tell them apart.

Thread-safety: any method from any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Interrupts:
    """The writes that are under way, and which of them were interrupted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handles: dict[int, int] = {}
        self._interrupted: set[int] = set()
        self._tell: Callable[[int], None] = lambda handle: None

    def tell(self, interrupted: Callable[[int], None]) -> None:
        """Call `interrupted` with the handle of each write that is interrupted from now on; it must return at once."""
        self._tell = interrupted

    def began(self, unique: int, handle: int) -> None:
        """Request `unique` writes to `handle`."""
        with self._lock:
            self._handles[unique] = handle

    def ended(self, unique: int) -> None:
        """Request `unique` is answered; no effect if it is not a write."""
        with self._lock:
            self._handles.pop(unique, None)
            self._interrupted.discard(unique)

    def interrupt(self, unique: int) -> None:
        """No process waits for request `unique` any more; no effect if it is not a write that is under way."""
        with self._lock:
            handle = self._handles.get(unique)
            if handle is not None:
                self._interrupted.add(unique)
        if handle is not None:
            self._tell(handle)  # without the lock: it may ask `is_interrupted` at once

    def is_interrupted(self, handle: int) -> bool:
        """Whether a write to `handle` that is under way was interrupted."""
        with self._lock:
            return any(self._handles[unique] == handle for unique in self._interrupted)
