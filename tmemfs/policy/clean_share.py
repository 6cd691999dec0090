"""Clean share: how much of the pool is to lie on the tier as well, and from which age on a segment is written for that.

What was stored a moment ago often dies young: a program ends, or its pages are swapped in and written to again. Written ahead, that
would wear the disk for nothing. So only segments of a certain age are written. Ages are sequence numbers; `AgeClock` says which of
them are old enough in seconds.
"""

from __future__ import annotations

from collections import deque
from typing import Final

#: Between two notes of the clock: how far the age of a segment may be overestimated.
_GRAIN_S: Final = 1.0


def copies_wanted(frames: int, clean: int, share: float) -> int:
    """How many of `frames` frames that hold segments are to be written ahead, so that `share` of them are clean; `clean` are."""
    return max(int(frames * share) - clean, 0)


class AgeClock:
    """Which sequence numbers were given out `rest_s` ago. The caller passes the time, in seconds that do not run backwards."""

    def __init__(self, rest_s: float) -> None:
        self.rest_s = rest_s
        #: When, and the first sequence number that had not been given out then; the oldest first.
        self._notes: deque[tuple[float, int]] = deque()
        self._old = 0

    def note(self, now: float, next_sequence: int) -> None:
        """The numbers below `next_sequence` have been given out by now."""
        while self._notes and now - self._notes[0][0] >= self.rest_s:
            self._old = self._notes.popleft()[1]
        last = self._notes[-1] if self._notes else (-_GRAIN_S, self._old)
        if next_sequence != last[1] and now - last[0] >= _GRAIN_S:
            self._notes.append((now, next_sequence))

    @property
    def youngest(self) -> int:
        """Segments with this age or less have rested."""
        return self._old - 1

    def wait_s(self, now: float) -> float:
        """Seconds until more of them will have rested; infinity, if none is to come."""
        return max(self._notes[0][0] + self.rest_s - now, 0.0) if self._notes else float("inf")
