"""LeaderFollowers: which of several threads reads requests, and what becomes of work that may block.

One thread is the leader: it reads requests and answers what can be answered at once. The others are followers, or busy with work.
The leader also does work that may block, and stays the leader meanwhile: to wake a follower takes as long as a read of a quick
disk, and the follower finds cold caches. The time that requests wait for such work is bounded:

- If requests were waiting when the work was done, or the work took longer than SLOW_S, the leader hands its role over to a follower
  before each of the next HAND_OVERS_AFTER_WAIT or HAND_OVERS_AFTER_SLOW tasks.
- If the work does not end, the leader loses its role: a thread of its own, the watch, looks every WATCH_PERIOD_S. If the leader is
  at the same work as at the look before, the watch promotes a follower. The watch sleeps while no leader does work.
- Work that is known to take long is never begun by a leader: it hands its role over first.

If all other threads are busy, the leader puts work into a backlog instead, and the first thread that finishes takes it from there.

Invariants:
1. There is exactly one leader at any time, until the end.
2. A thread that handed its role over, or lost it to the watch, reads no request until it is promoted again.

Source: Schmidt et al., 'Leader/Followers' (2000), except that a leader may do work and stay the leader. Knows nothing of requests.

Thread-safety: `serve` and `do` from the threads that take part; `watch` from one that does not.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

Work = Callable[[], None]

#: Period of the watch; each look takes 45 us of CPU.
WATCH_PERIOD_S: Final = 0.005
#: Looks without a new work before the watch sleeps.
_QUIET_LOOKS: Final = 4
#: Some ten times what it takes to hand the role over.
SLOW_S: Final = 0.0005
#: With 4 a load from RAM beside loads from the disk took 76 us, with 16 it took 69, as if the leader never did work; with either, a
#: program that faults alone is as quick (docs/decisions/0012).
HAND_OVERS_AFTER_WAIT: Final = 8
#: One in so many loads of a slow disk makes others wait for SLOW_S and longer.
HAND_OVERS_AFTER_SLOW: Final = 256


class LeaderFollowers:
    """The role of the leader among `threads` threads, each of which calls `serve`; all but one of them may be busy with work.

    `has_requests` says whether requests wait for the leader.
    """

    def __init__(self, threads: int, has_requests: Callable[[], bool], watch_period_s: float = WATCH_PERIOD_S) -> None:
        # constant after construction
        self._most_busy = threads - 1
        self._has_requests = has_requests
        self._watch_period_s = watch_period_s
        # Held while there is a leader. To hand the role over, or to take it away, is to release it: that promotes a follower.
        self._role = threading.Lock()
        self._lock = threading.Lock()
        # Released to wake the watch.
        self._watch_sleeps = threading.Lock()
        self._watch_sleeps.acquire()
        # guarded by the lock
        self._busy = 0
        self._backlog: deque[Work] = deque()
        self._works = 0
        #: The number of the work that the leader is doing; 0: none.
        self._leader_does = 0
        self._is_over = False
        #: Whether the watch looks. It reads this without the lock, and is woken when it has become true.
        self.is_watching = False
        # of the leader, and of the watch as it takes the role away
        self._hand_overs = 0

    def serve(self, lead: Callable[[], bool]) -> None:
        """Wait to be promoted, call `lead`, and so on to the end. `lead` gives True at the end, False once `do` returned False."""
        while self._await_promotion():
            is_over = True
            try:
                is_over = lead()
            finally:
                # An error of `lead` ends it for all: no other thread could tell whether this one is the leader still.
                if is_over:
                    self._end()

    def do(self, work: Work, is_long: bool = False) -> bool:
        """Do `work`, which may block and must not raise, or leave it to another thread; whether the caller is the leader still."""
        if not is_long and (number := self._begin_as_leader()):
            began = time.monotonic()
            work()
            if self._end_as_leader(number, time.monotonic() - began > SLOW_S):
                return True
        elif self._hand_over(work):
            work()
        else:
            return True
        while (waiting := self._next_work()) is not None:
            waiting()
        return False

    def watch(self) -> None:
        """Promote a follower when the leader is at one work for long; returns at the end."""
        seen_works = seen_work = quiet_looks = 0
        while not self._is_over:
            self._watch_sleeps.acquire(timeout=self._watch_period_s if self.is_watching else -1)
            with self._lock:
                # The same work as at the last look: it has taken one to two periods.
                if self._leader_does and self._leader_does == seen_work:
                    self._take_role_away()
                quiet_looks = quiet_looks + 1 if self._works == seen_works else 0
                self.is_watching = quiet_looks < _QUIET_LOOKS
                seen_works, seen_work = self._works, self._leader_does

    def _begin_as_leader(self) -> int:
        """The number of the work that the leader begins now; 0: it is to hand its role over first."""
        with self._lock:
            # With all others busy there is no follower for the watch to promote: the work goes to the backlog.
            if self._hand_overs or self._busy == self._most_busy:
                self._hand_overs = max(self._hand_overs - 1, 0)
                return 0
            self._works += 1
            self._leader_does = self._works
            if not self.is_watching:
                self.is_watching = True
                self._wake_watch()
            return self._leader_does

    def _end_as_leader(self, number: int, was_slow: bool) -> bool:
        """Whether the thread that began work `number` as the leader is the leader still."""
        with self._lock:
            # Another number, or none: the watch promoted a follower meanwhile. It decides under the same lock.
            is_leader = self._leader_does == number
            if is_leader:
                self._leader_does = 0
        if is_leader and (was_slow or self._has_requests()):
            self._hand_overs = HAND_OVERS_AFTER_SLOW if was_slow else HAND_OVERS_AFTER_WAIT
        return is_leader

    def _take_role_away(self) -> None:
        """Promote a follower in place of the leader, which is busy from now on. Under the lock."""
        self._leader_does = 0
        self._busy += 1
        self._hand_overs = HAND_OVERS_AFTER_SLOW
        self._role.release()

    def _hand_over(self, work: Work) -> bool:
        """Promote a follower, so that the caller is to do `work`; False, and `work` in the backlog, if all others are busy."""
        with self._lock:
            # Under the lock under which a busy thread looks into the backlog for the last time (`_next_work`).
            if self._busy == self._most_busy:
                self._backlog.append(work)
                return False
            self._busy += 1
        self._role.release()
        return True

    def _next_work(self) -> Work | None:
        """The next work of the backlog for a thread that is busy; None: there is none, and the caller is a follower again."""
        with self._lock:
            if self._backlog:
                return self._backlog.popleft()
            self._busy -= 1
            return None

    def _await_promotion(self) -> bool:
        """Wait to become the leader; False at the end."""
        self._role.acquire()
        if self._is_over:
            self._role.release()  # for the next follower, which is to learn of the end, too
        return not self._is_over

    def _wake_watch(self) -> None:
        """Have the watch look. Under the lock."""
        if self._watch_sleeps.locked():
            self._watch_sleeps.release()

    def _end(self) -> None:
        """There is no leader any more: let all threads return."""
        with self._lock:
            self._is_over = True
            self._wake_watch()
        self._role.release()
