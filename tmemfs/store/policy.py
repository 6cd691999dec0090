"""Policy: pure decisions of the pool. Time and sizes are passed in; nothing is remembered but what is returned.

Watermarks with hysteresis: the background shrinks from above `high` until below `low`.
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
        """Watermarks under `max_bytes`; what is not given is 90% and 80% of it, and nothing is above what it stays below."""
        top = min(int(max_bytes * HIGH_SHARE) if high is None else high, max_bytes)
        bottom = min(int(max_bytes * LOW_SHARE) if low is None else low, top)
        return cls(max_bytes, top, bottom)


def background_goal(current_bytes: int, marks: Watermarks, shrinking: bool) -> int:
    """Bytes the background has to free now: 0 below `high`, or below `low` once it is shrinking."""
    trigger = marks.low if shrinking else marks.high
    return max(current_bytes - marks.low, 0) if current_bytes > trigger else 0
