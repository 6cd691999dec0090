"""The watchdog: whether a worker hangs, judged by its words in the status region alone. Pure: time is passed in.

A worker hangs if requests wait and, for `seconds`, none was answered: no word of a thread of the page path has changed. A disk that
does not answer is no reason to kill the worker, which could do nothing better. So while the event loop runs, and a call of the tier
has begun and none has ended all that time, the worker is left alone. One that is stopped, or whose event loop hangs too, is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tmemfs.fuse.handling import IDLE

#: A worker beats every two seconds; on a busy machine it may be late.
_LATE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Signs:
    """What can be seen of a worker: whether the kernel has requests for it that it has not read, and its words."""

    has_unread: bool
    handling: tuple[int, ...]
    pulse: int
    tier_begun: int
    tier_ended: int

    @property
    def has_waiting(self) -> bool:
        """Whether a request waits for an answer of the page path."""
        return self.has_unread or any(word and not word & IDLE for word in self.handling)


class Watchdog:
    """Watches one worker from its start, at `now`; all times are seconds of one clock."""

    def __init__(self, now: float) -> None:
        self._signs = Signs(False, (), 0, 0, 0)
        self._answered = self._beaten = self._tier_moved = now

    def look(self, signs: Signs, now: float) -> None:
        """Take note of what is seen now."""
        before, self._signs = self._signs, signs
        if not signs.has_waiting or signs.handling != before.handling:
            self._answered = now
        if signs.pulse != before.pulse:
            self._beaten = now
        if signs.tier_begun == signs.tier_ended or signs.tier_ended != before.tier_ended:
            self._tier_moved = now

    def silent_s(self, now: float) -> float:
        """For how long requests have waited without an answer."""
        return now - self._answered

    def hangs(self, seconds: float, now: float) -> bool:
        """Whether the worker hangs, by what was seen last."""
        if now - self._answered < seconds:
            return False
        waits_for_disk = now - self._tier_moved >= seconds and now - self._beaten < max(seconds, _LATE_S)
        return not waits_for_disk
