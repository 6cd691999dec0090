"""Holes: punch a hole where each retired extent was, which frees its disk space.

If a hole cannot be punched, its extent may still be written over, and punching is tried again later. On a tier that cannot discard,
none is tried.

Thread-safety: any thread. `punch` may wait for another thread that punches.

Invariant: 1. Every plan taken from the store is committed or aborted, whatever the tier answers.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import dataclass
from typing import Final

from tmemfs.errors import TierError
from tmemfs.store.tmem import Tmem
from tmemfs.tiers.tier import Tier

log = logging.getLogger(__name__)

#: Holes that could not be punched are tried again after FIRST_PAUSE_S, then after twice as long each time, up to LONGEST_PAUSE_S.
FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 60.0


@dataclass(slots=True)
class HoleCounts:
    """Extents whose holes were punched, and times that failed, since the start."""

    discarded: int = 0
    discard_errors: int = 0


class Holes:
    """Punches the holes of `tmem`'s extents into `tier`."""

    def __init__(self, tmem: Tmem, tier: Tier) -> None:
        self._tmem = tmem
        self._tier = tier
        # guarded by the lock, but looked at without it
        self._lock = threading.Lock()
        self.counts = HoleCounts()
        self._pause_s = FIRST_PAUSE_S
        if not tier.can_discard:
            tmem.reclaim.punch_none()
        # A recovery does not know which holes were punched before, so all of them are due.
        self._again_at = time.monotonic() if tmem.extents.has_stale else math.inf

    @property
    def wait_s(self) -> float:
        """Seconds until those that could not be punched are to be tried again."""
        return max(self._again_at - time.monotonic(), 0.0)

    @property
    def is_due(self) -> bool:
        """Whether there is something to punch. Without the lock: a hint."""
        return self._tmem.extents.has_retired or not self.wait_s

    def punch(self, again: bool = False) -> None:
        """Punch what is due, `again` also those put off; a second thread waits for the first, whose extents it may need."""
        reclaim = self._tmem.reclaim
        with self._lock:
            if not self._tier.can_discard:  # it may have turned out only when the first hole was refused
                reclaim.punch_none()
            elif again or not self.wait_s:
                reclaim.punch_again()
            while plan := reclaim.plan_discard():
                try:
                    self._tier.discard(plan.extents)
                except BaseException as error:
                    reclaim.abort_discard(plan)  # also for a bug: an extent whose plan is never ended is lost for good
                    if not isinstance(error, TierError):
                        raise
                    self._put_off(error)
                    continue  # the others may still be punched
                reclaim.commit_discard(plan)
                self.counts.discarded += len(plan.extents) * self._tier.can_discard
            # All that had failed was punched, or written over: the next failure is the first of its kind again.
            if not self._tmem.extents.has_stale:
                self._pause_s, self._again_at = FIRST_PAUSE_S, math.inf

    def _put_off(self, error: TierError) -> None:
        """Holes could not be punched: try again later, after twice as long each time, and log it as often."""
        self.counts.discard_errors += 1
        if not self.wait_s or math.isinf(self._again_at):
            log.warning("%s; tried again in %.0f s, and written over meanwhile", error, self._pause_s)
            self._again_at = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
