"""LeaderFollowers: which of several threads reads requests, and what becomes of work that may block.

One thread leads: it reads requests and answers what can be answered at once. Work that may block it does too, and keeps the lead
meanwhile: to wake another thread takes as long as a quick disk, and that one finds cold caches. How long requests wait for that is
bounded:

- If some were waiting when the work was done, or it took longer than SLOW_S, the leader hands the lead to another thread before it
  does the next LEAVE_ASKED or LEAVE_SLOW works.
- If it does not end, the lead is taken away: a thread that only watches looks every PATIENCE_S, and passes the lead of whoever has
  been at the same work since the look before to another thread. It sleeps while nobody keeps the lead.
- Work that is known to take long is never begun with the lead.

What comes while all others are away is left for the first of them that is done. So there is always one that leads.

Source: Schmidt et al., 'Leader/Followers' (2000), but for keeping the lead. Knows nothing of requests.

Thread-safety: any method from any thread that takes turns; `watch` from one that does not.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

W = TypeVar("W")

#: The watch looks so often; each time it takes 45 us of CPU.
PATIENCE_S: Final = 0.005
#: Looks at a lead that nobody kept before the watch sleeps.
_QUIET_LOOKS: Final = 4
#: Some ten times what it takes to hand on the lead.
SLOW_S: Final = 0.0005
#: With 4 a load from RAM beside loads from the disk took 76 us, with 16 it took 69, as if the lead were never kept; with either a
#: program that faults alone is as quick (docs/decisions/0012).
LEAVE_ASKED: Final = 8
#: One in so many loads of a slow disk has others wait for SLOW_S and longer.
LEAVE_SLOW: Final = 256


class LeaderFollowers(Generic[W]):
    """LeaderFollowers of `threads` threads, each of which calls `take`; all but one of them may be away with work.

    `do` does work and must not raise. `is_asked` says whether requests wait for the leader.
    """

    def __init__(self, threads: int, do: Callable[[W], None], is_asked: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
        # constant after construction
        self._most_away = threads - 1
        self._do = do
        self._is_asked = is_asked
        self._patience_s = patience_s
        self._lead = threading.Lock()
        self._lock = threading.Lock()
        self._nudge = threading.Lock()
        self._nudge.acquire()
        # guarded by the lock
        self._away = 0
        self._left: deque[W] = deque()
        self._works = 0
        self._kept = 0
        self._is_over = False
        #: Whether the watch looks; it reads that without the lock, and is nudged when it has become true.
        self.is_watching = False
        # the leader's, but that the watch sets it when it takes the lead
        self._to_leave = 0

    def take(self, lead: Callable[[], bool]) -> None:
        """Lead, come back after `work` has cost the lead, and so on, until it is over. `lead` gives whether it is."""
        while self._may_lead():
            is_over = True
            try:
                is_over = lead()
            finally:
                if is_over:
                    self._end()

    def work(self, work: W, is_long: bool = False) -> bool:
        """The leader has `work` that may block: it is done, or left for another; whether the caller leads afterwards."""
        if not is_long and (number := self._keep()):
            began = time.monotonic()
            self._do(work)
            if self._still_leads(number, time.monotonic() - began > SLOW_S):
                return True
        elif self._leave_with(work):
            self._do(work)
        else:
            return True
        while (left := self._next()) is not None:
            self._do(left)
        return False

    def watch(self) -> None:
        """Take the lead from whoever keeps it for long, until it is over."""
        seen_works = seen_kept = quiet = 0
        while not self._is_over:
            self._nudge.acquire(timeout=self._patience_s if self.is_watching else -1)
            with self._lock:
                if self._kept and self._kept == seen_kept:
                    self._take_lead()
                quiet = quiet + 1 if self._works == seen_works else 0
                self.is_watching = quiet < _QUIET_LOOKS
                seen_works, seen_kept = self._works, self._kept

    def _keep(self) -> int:
        """The number of the work for which the leader is to keep the lead now; 0: it is not to keep it."""
        with self._lock:
            if self._to_leave or self._away == self._most_away:
                self._to_leave = max(self._to_leave - 1, 0)
                return 0
            self._works += 1
            self._kept = self._works
            if not self.is_watching:
                self.is_watching = True
                self._wake_watch()
            return self._kept

    def _still_leads(self, number: int, was_slow: bool) -> bool:
        """Whether the leader that kept the lead for work `number` has it still."""
        with self._lock:
            leads = self._kept == number
            if leads:
                self._kept = 0
        if leads and (was_slow or self._is_asked()):
            self._to_leave = LEAVE_SLOW if was_slow else LEAVE_ASKED
        return leads

    def _take_lead(self) -> None:
        """Whoever keeps the lead has it no more. Under the lock."""
        self._kept = 0
        self._away += 1
        self._to_leave = LEAVE_SLOW
        self._lead.release()

    def _leave_with(self, work: W) -> bool:
        """Whether the leader is to do `work` itself now, and leads no more."""
        with self._lock:
            if self._away == self._most_away:
                self._left.append(work)
                return False
            self._away += 1
        self._lead.release()
        return True

    def _wake_watch(self) -> None:
        """Have the watch look. Under the lock."""
        if self._nudge.locked():
            self._nudge.release()

    def _end(self) -> None:
        """Nobody leads any more."""
        with self._lock:
            self._is_over = True
            self._wake_watch()
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
