"""Turns: which of several threads reads requests, and what becomes of requests that may block.

One thread leads: it reads requests and answers what can be answered at once. With one that may block it leaves the lead to another
thread and does that work itself, so that nobody has to be woken before the work begins: a wake-up costs half of what a read from
the disk does. What comes while all others are away is left for the first of them that is done. So there is always one that leads.

Source: Schmidt et al., 'Leader/Followers' (2000). Knows nothing of requests.

Thread-safety: any method from any thread that takes turns.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

W = TypeVar("W")


class Turns(Generic[W]):
    """Turns of `threads` threads, each of which calls `take`; all but one of them may be away with work."""

    def __init__(self, threads: int) -> None:
        self._most_away = threads - 1
        self._lead = threading.Lock()
        self._lock = threading.Lock()
        self._away = 0
        self._left: deque[W] = deque()
        self._is_over = False

    def take(self, lead: Callable[[], W | None], do: Callable[[W], None]) -> None:
        """Lead, do the work that was left with, and so on, until it is over.

        `lead` gives the work with which it left (`leave_with`), or None at the end.
        """
        while self._may_lead():
            work = None
            try:
                work = lead()
            finally:
                if work is None:
                    self._end()
            while work is not None:
                do(work)
                work = self._next()

    def leave_with(self, work: W) -> bool:
        """The leader has `work` that may block: whether it is to do that itself now, and leads no more."""
        with self._lock:
            if self._away == self._most_away:
                self._left.append(work)
                return False
            self._away += 1
        self._lead.release()
        return True

    def _end(self) -> None:
        """Nobody leads any more."""
        self._is_over = True
        self._lead.release()

    def _may_lead(self) -> bool:
        """Wait for the lead; False when it is over."""
        self._lead.acquire()
        if self._is_over:
            self._lead.release()
        return not self._is_over

    def _next(self) -> W | None:
        """What was left for one that is away; None: it is back."""
        with self._lock:
            if self._left:
                return self._left.popleft()
            self._away -= 1
            return None
