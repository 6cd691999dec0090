"""Watermarks of the pool, with hysteresis: the background shrinks from above `high` until below `low`.

Without the gap between the two the background would wake up for each segment that is stored at the limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

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
        """Watermarks under `max_bytes`. One that is not given is 90% or 80% of it. A given one is capped by the mark above it."""
        top = min(int(max_bytes * HIGH_SHARE) if high is None else high, max_bytes)
        bottom = min(int(max_bytes * LOW_SHARE) if low is None else low, top)
        return cls(max_bytes, top, bottom)

    def under(self, ceiling: float) -> Watermarks:
        """The same, except that shrinking starts above `ceiling` and stops there."""
        if ceiling >= self.high:  # not max: between the two the background shrinks already
            return self
        return Watermarks(self.max, int(ceiling), min(self.low, int(ceiling)))


def background_goal(current_bytes: int, marks: Watermarks, shrinking: bool) -> int:
    """Bytes the background has to free now: 0 below `high`, or below `low` once it is shrinking."""
    trigger = marks.low if shrinking else marks.high
    return max(current_bytes - marks.low, 0) if current_bytes > trigger else 0
