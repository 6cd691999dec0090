"""The budget of the cleaner: a token bucket for the rate, and a quota for the day."""

from __future__ import annotations

import math
from typing import Final

_DAY_S: Final = 86400.0


class Budget:
    """What the cleaner may write: `rate` bytes per second, in bursts of up to a second, and `daily` bytes in 24 hours.

    The caller passes the time, in seconds of any clock that does not run backwards, and serializes the calls.
    """

    def __init__(self, rate: float, daily: float = math.inf) -> None:
        self._rate = rate
        self._daily = daily
        self._saved = 0.0
        self._saved_at = 0.0
        self._day = -1
        self._spent_today = 0

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self._rate

    @property
    def daily(self) -> float:
        """Bytes in 24 hours; infinity: no limit."""
        return self._daily

    def set(self, rate: float | None = None, daily: float | None = None) -> None:
        """Change the rate or the quota. What was spent still counts."""
        self._rate = self._rate if rate is None else rate
        self._daily = self._daily if daily is None else daily

    def spend(self, count: int, now: float) -> None:
        """`count` bytes were written at `now`."""
        self._saved = self._available(now) - count  # may become negative: see `wait_s`
        self._saved_at = now
        self._spent_today = self.spent_today(now) + count
        self._day = int(now // _DAY_S)

    def spent_today(self, now: float) -> int:
        """Bytes written since the last multiple of 24 hours."""
        return self._spent_today if int(now // _DAY_S) == self._day else 0

    def left_today(self, now: float) -> float:
        """Bytes that may still be written today."""
        return max(self._daily - self.spent_today(now), 0)

    def wait_s(self, now: float) -> float:
        """Seconds to wait before the next write."""
        if not self.left_today(now):
            return _DAY_S - now % _DAY_S  # the quota of a day begins at multiples of 24 hours, as `spent_today` counts
        # A merge is written as a whole, so it may overdraw the bucket. The debt delays the next one, and the rate holds on average.
        missing = -self._available(now)
        return max(missing / self._rate, 0.0)

    def _available(self, now: float) -> float:
        # Capped at one second's worth, so that a long rest is not followed by a long burst.
        return min(self._saved + (now - self._saved_at) * self._rate, self._rate)
