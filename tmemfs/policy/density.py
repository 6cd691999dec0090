"""Policy: pure decisions of the pool. Time and sizes are passed in; nothing is remembered but what is returned.

Watermarks with hysteresis: the background shrinks from above `high` until below `low`. Victims of write-back: the oldest, but one
that was loaded from is passed over once. Victims of cleaning: benefit by cost, after Rosenblum and Ousterhout, 'The Design and
Implementation of a Log-Structured File System' (1992), section 3.6.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Final, TypeVar

T = TypeVar("T")

#: A segment is written as it is if this share of it lives; otherwise its live records are merged with others' first.
DENSE_SHARE: Final = 0.95
#: What was encoded anew is kept if it is this share of what it was, or less.
KEPT_SHARE: Final = 0.9
#: How much the age of a segment counts for its cleaning.
AGE_EXPONENT: Final = 0.25
#: How many segments a search for a victim looks at, at most.
LOOK_AT: Final = 32
HIGH_SHARE: Final = 0.90
LOW_SHARE: Final = 0.80


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Limits of the pool's RAM, in bytes: low <= high <= max."""

    max: int
    high: int
    low: int

    @classmethod
    def below(cls, max_bytes: int, high: int | None = None, low: int | None = None) -> Watermarks:
        """Watermarks under `max_bytes`; what is not given is 90% and 80% of it, and nothing is above what it stays below."""
        top = min(int(max_bytes * HIGH_SHARE) if high is None else high, max_bytes)
        bottom = min(int(max_bytes * LOW_SHARE) if low is None else low, top)
        return cls(max_bytes, top, bottom)

    def under(self, ceiling: float) -> Watermarks:
        """The same, but that shrinking starts above `ceiling` and stops there."""
        if ceiling >= self.high:
            return self
        return Watermarks(self.max, int(ceiling), min(self.low, int(ceiling)))


def background_goal(current_bytes: int, marks: Watermarks, shrinking: bool) -> int:
    """Bytes the background has to free now: 0 below `high`, or below `low` once it is shrinking."""
    trigger = marks.low if shrinking else marks.high
    return max(current_bytes - marks.low, 0) if current_bytes > trigger else 0


def next_victim(oldest_first: Iterable[tuple[T, bool]]) -> tuple[T | None, list[T]]:
    """The first that was not loaded from, and those passed over before it; the very first where all of them were."""
    passed: list[T] = []
    for segment, was_loaded in islice(oldest_first, LOOK_AT):
        if not was_loaded:
            return segment, passed
        passed.append(segment)
    return (passed[0], passed[1:]) if passed else (None, passed)


def saves_enough(before_bytes: int, after_bytes: int) -> bool:
    """Whether encoding anew made of `before_bytes` so few that it is worth the slower load: a tenth less."""
    return after_bytes <= KEPT_SHARE * before_bytes


def is_sparse(live_bytes: int, fill_bytes: int) -> bool:
    """Whether too little of a segment lives for it to be written as it is."""
    return live_bytes < DENSE_SHARE * fill_bytes


def benefit_by_cost(live_share: float, age: float) -> float:
    """What cleaning is worth: the space it frees, weighed by how long that will stay free, by what reading and writing cost.

    The age counts by its fourth root: pages that are hot die in RAM, so what reaches the tier differs less in age than a whole log
    (docs/decisions/0005: 1.35 bytes written by byte stored under zipf, 1.58 with the age itself, 1.44 without it).
    """
    return (1 - live_share) * math.pow(age, AGE_EXPONENT) / (1 + live_share)


def greedy(live_share: float, age: float) -> float:
    """The cleaner to compare with: the emptiest first."""
    return 1 - live_share


@dataclass(frozen=True, slots=True)
class Space:
    """RAM or the tier: bytes its segments occupy, bytes of live records in them, and bytes still free for more."""

    occupied: int
    live: int
    free: int

    @property
    def dead(self) -> int:
        """Bytes occupied by nothing that lives."""
        return self.occupied - self.live

    @property
    def amplification(self) -> float:
        """Bytes occupied by live byte; 1 where there is nothing."""
        return self.occupied / self.live if self.live else 1.0 + (self.occupied > 0)


_DAY_S: Final = 86400.0


class Budget:
    """What the cleaner may write: `rate` bytes a second, in bursts of up to a second, and `daily` bytes in 24 hours. Pure."""

    def __init__(self, rate: float, daily: float = math.inf) -> None:
        self.rate = rate
        self.daily = daily
        self._saved = 0.0
        self._saved_at = 0.0
        self._day = -1
        self._spent_today = 0

    def spend(self, count: int, now: float) -> None:
        """`count` bytes were written at `now`, seconds of any clock that does not go back."""
        self._saved = self._available(now) - count
        self._saved_at = now
        self._spent_today = self.spent_today(now) + count
        self._day = int(now // _DAY_S)

    def spent_today(self, now: float) -> int:
        """Bytes written since the last multiple of 24 hours."""
        return self._spent_today if int(now // _DAY_S) == self._day else 0

    def left_today(self, now: float) -> float:
        """Bytes that may still be written today."""
        return max(self.daily - self.spent_today(now), 0)

    def wait_s(self, now: float) -> float:
        """Seconds to wait before the next write."""
        if not self.left_today(now):
            return _DAY_S - now % _DAY_S
        missing = -self._available(now)
        return max(missing / self.rate, 0.0)

    def _available(self, now: float) -> float:
        return min(self._saved + (now - self._saved_at) * self.rate, self.rate)


#: The background merges above START until below STOP, where at least DEAD_BYTES are dead; or while the tier has less than
#: FREE_BYTES free.
START_AMPLIFICATION: Final = 1.5
STOP_AMPLIFICATION: Final = 1.3
DEAD_BYTES: Final = 8 << 20
FREE_BYTES: Final = 8 << 20


def compaction_wanted(space: Space, compacting: bool) -> bool:
    """Whether the background has to merge segments now: so much of `space` is dead."""
    threshold = STOP_AMPLIFICATION if compacting else START_AMPLIFICATION
    return space.dead >= DEAD_BYTES and space.amplification > threshold


def cleaning_wanted(space: Space, cleaning: bool) -> bool:
    """Whether the background has to clean the tier now: so much of it is dead, or so little free."""
    least_free = min(FREE_BYTES, space.occupied // 64)
    if space.free < least_free * (1 + cleaning) and space.dead > least_free:
        return True
    return compaction_wanted(space, cleaning)
