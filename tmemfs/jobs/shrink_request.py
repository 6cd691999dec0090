"""What control/shrink is asked for, what it answers, and the tally of a shrink under way."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from typing import Final

from tmemfs.errors import BadValue
from tmemfs.jobs.stop import DEADLINE_PASSED
from tmemfs.units import SEGMENT_BYTES, parse_seconds, parse_size

EMPTY: Final = "the pool holds no more pages"


@dataclass(frozen=True, slots=True)
class ShrinkRequest:
    """`goal_bytes` of RAM to free (inf: all of it), within `deadline_s` seconds."""

    goal_bytes: float
    deadline_s: float = math.inf

    @classmethod
    def parse(cls, text: str) -> ShrinkRequest:
        """'64M', '64M deadline=2s' or 'all'. Raises BadValue."""
        size, *settings = text.split() or [""]
        deadline_s = math.inf
        for setting in settings:
            key, _, value = setting.partition("=")
            if key != "deadline":
                raise BadValue(f"unknown setting {setting!r}: write for example '64M deadline=2s'")
            deadline_s = parse_seconds(value)
        goal = math.inf if size == "all" else parse_size(size)
        if not goal:
            raise BadValue("shrink needs a size above 0: write for example '64M', or 'all'")
        return cls(goal, deadline_s)


@dataclass(frozen=True, slots=True)
class ShrinkAnswer:
    """What a shrink did: bytes of RAM freed, bytes and pages written; `reason` says why it fell short, None if it did not."""

    requested: float
    freed: int
    written: int
    pages: int
    seconds: float
    reason: str | None


class Tally:
    """One shrink under way: how much its threads have claimed, and what they did. Any thread.

    `include_open`: open segments are sealed and written too. `is_request`: somebody waits for the answer. `writers` threads write.
    """

    def __init__(self, request: ShrinkRequest, include_open: bool, is_request: bool = False, writers: int = 1) -> None:
        # constant after construction
        self.request = request
        self.include_open = include_open
        self.is_request = is_request
        self.writers = writers
        self.started = time.monotonic()
        #: Released by those that write, once for each step and once at their end; acquired by the one that releases memory.
        self.written_back = threading.Semaphore(0)
        # guarded by the lock
        self._lock = threading.Lock()
        self._claimed = self._freed = self.written = self._pages = 0
        self._writing = writers
        self._reason: str | None = None
        self.stuck: str | None = None
        self.is_over = False

    def claim(self) -> bool:
        """Whether one more segment is wanted; if so, it counts as freed until `done` or `give_back_claim` corrects that."""
        with self._lock:
            if self._claimed >= self.request.goal_bytes or self._reason is not None:
                return False
            if self._is_late:
                self._reason = DEADLINE_PASSED
                return False
            self._claimed += SEGMENT_BYTES
            return True

    @property
    def is_to_end(self) -> bool:
        """Whether it was stopped, or its deadline has passed."""
        return self._reason is not None or self._is_late

    @property
    def _is_late(self) -> bool:
        return time.monotonic() - self.started > self.request.deadline_s

    def give_back_claim(self) -> None:
        """Nothing was there for the last claim."""
        with self._lock:
            self._claimed -= SEGMENT_BYTES

    def done(self, written: int, pages: int, freed: int) -> None:
        """One segment was written back, or merged. If the reserve took its frame, nothing is freed, and another one is wanted."""
        with self._lock:
            self._freed += freed
            self._claimed -= SEGMENT_BYTES - freed
            self.written += written
            self._pages += pages

    def stop(self, reason: str, stuck: bool = False) -> None:
        """Nothing more can be done, because of `reason`; the first one stands. `stuck`: the tier takes no more."""
        with self._lock:
            self._reason = self._reason or reason
            self.stuck = self.stuck or (reason if stuck else None)

    def end(self) -> None:
        """A thread that writes has ended: after the last of them the one that releases ends after its next look."""
        with self._lock:
            self._writing -= 1
            self.is_over = not self._writing  # first: the other thread looks at it whenever it is woken
        self.written_back.release()

    def answer(self) -> ShrinkAnswer:
        """What came of it."""
        request = self.request
        # With a goal of 'all' an empty pool is what was asked for, and no reason why it fell short.
        is_all_done = math.isinf(request.goal_bytes) and self._reason == EMPTY
        reason = (self._reason or "it was stopped") if self._freed < request.goal_bytes and not is_all_done else None
        return ShrinkAnswer(request.goal_bytes, self._freed, self.written, self._pages, time.monotonic() - self.started, reason)
