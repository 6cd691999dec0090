"""Write-ahead over a trace: how much is written, and how much of that died in RAM and need not have been. Pure, as replay.py.

Segments that have rested are written, the oldest first, until `share` of those in RAM are clean. What is clean leaves RAM before
anything else. The disk keeps up: what limits the job's rate is left out, so this is the most that it would write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tmemfs.policy.clean_share import copies_wanted
from tmemfs.policy.victims import next_victim
from tools.trace.format import Request
from tools.trace.replay import Pool


@dataclass(frozen=True, slots=True)
class Ahead:
    """Segments written in all, bytes that were live when they were written ahead, and those of them that died in RAM."""

    written: int
    ahead_bytes: int
    died_bytes: int


class AheadPool(Pool):
    """A pool of `limit` segments, of which `share` are written ahead after a rest of `rest_us`."""

    def __init__(self, limit: int, share: float, rest_us: float) -> None:
        super().__init__(limit, next_victim)
        self._share = share
        self._rest_us = rest_us
        self._now_us = 0
        self._opened_us: dict[int, int] = {}
        self._clean: dict[int, int] = {}
        self.ahead_bytes = self.died_bytes = 0

    def play(self, request: Request) -> None:
        """Perform one request, and write what has rested by then."""
        self._now_us = request.at_us
        super().play(request)
        while copies_wanted(self.in_ram, len(self._clean), self._share) and (rested := self._rested()) is not None:
            self._clean[rested] = self.live[rested]
            self.ahead_bytes += self.live[rested]
            self.outcome.written += 1

    def opened(self, segment: int) -> None:
        """Note when it was."""
        self._opened_us[segment] = self._now_us

    def evict_free(self) -> bool:
        """Drop a clean segment, if there is one."""
        if not self._clean:
            return False
        segment = next(iter(self._clean))
        self.died_bytes += self._clean.pop(segment) - self.live[segment]
        self.leave(segment)
        return True

    def vanished(self, segment: int) -> None:
        """All of it is dead."""
        self.died_bytes += self._clean.pop(segment, 0)

    def _rested(self) -> int | None:
        for lane in self.lanes:
            for segment in lane.sealed:
                if segment not in self._clean:
                    return segment if self._now_us - self._opened_us[segment] >= self._rest_us else None
        return None


def replay_ahead(requests: Sequence[Request], limit: int, share: float, rest_us: float) -> Ahead:
    """What a pool of `limit` segments writes for `requests`."""
    pool = AheadPool(limit, share, rest_us)
    for request in requests:
        pool.play(request)
    return Ahead(pool.outcome.written, pool.ahead_bytes, pool.died_bytes)
