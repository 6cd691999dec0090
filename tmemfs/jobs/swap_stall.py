"""SwapStallDetector: the kernel writes pages to swap, and none of them reaches us.

On its way here a swap write allocates a little. If its worker finds no page above the kernel's minimum watermark, it waits for one,
and what would free one is that write. Priority lets it go below that watermark (system/kworkers.py), but not a worker that waited
already when it got it. Then the watermark is lowered, in steps, until something arrives again, for LONGEST_S at most.

It can only be our swap that waits if it is on (jobs/kernel_tuning.py), and the kernel has requests at its loop device or had some a
moment ago. So an idle mount never lowers anything for what happens elsewhere.

A disk that takes long with what reached us samples the same: then the watermark is lowered for nothing.

Called in trio's thread. Knows nothing of the pressure controller.
"""

from __future__ import annotations

import logging
import math
from typing import Final

from tmemfs.jobs.kernel_tuning import Tuning
from tmemfs.store.tmem import Tmem
from tmemfs.system.kernel_settings import MINIMUM
from tmemfs.system.kernel_settings import SHARES as ALL_SHARES
from tmemfs.system.pressure_signals import Memory

log = logging.getLogger(__name__)

#: So long without a page stored or loaded while pages are under write-back; a write that goes on takes milliseconds.
STILL_S: Final = 0.25
#: Less than this share of the reserve to be had without swapping.
SHORT_SHARE: Final = 1 / 2
#: Of the watermark, one after the other, each for STILL_S.
SHARES: Final = ALL_SHARES[MINIMUM]
#: What has not helped so long after the stall began will not: it is something else. It is tried again after a pause.
LONGEST_S: Final = 2.0
PAUSE_S: Final = 10.0
#: The kernel may hold a request back before it counts it as one at the device: so soon after the last page nothing is idle.
RECENT_S: Final = 2.0


class SwapStallDetector:
    """Sees that pages go on being asked of `tmem`, and lowers the minimum watermark by `tuning` when none is."""

    def __init__(self, tmem: Tmem, tuning: Tuning) -> None:
        self._tmem = tmem
        self._tuning = tuning
        self._pages = self._pages_now()
        self._moved_at = -math.inf
        self._since: float | None = None
        self._steps = 0
        self._is_lower = False
        self.count = 0

    @property
    def is_suspected(self) -> bool:
        """Whether the next sample is to come soon, though nothing moves."""
        return self._since is not None

    def sample(self, now: float, memory: Memory, reserve_bytes: int) -> None:
        """See whether anything moves."""
        pages, before = self._pages_now(), self._pages
        self._pages = pages
        if pages != before:
            self._moved_at = now
        if pages != before or memory.available >= SHORT_SHARE * reserve_bytes or not self._is_awaited(now, memory):
            self.end()
        elif self._since is None:
            self._since = now
        elif now - self._since >= LONGEST_S:
            self.end()
            self._since = now + PAUSE_S
        elif self._steps < len(SHARES) and now - self._since >= STILL_S * (self._steps + 1):
            self._lower()
        elif self._is_lower:  # another daemon may have restored it, for it does not know of us
            self._tuning.lower_minimum(SHARES[self._steps - 1])

    def end(self) -> None:
        """It moves, or nobody samples any more."""
        self._tuning.restore_minimum()
        if self._is_lower:
            log.warning("no page was stored or loaded while memory was short: the minimum watermark was lowered for a moment")
        self._since, self._steps, self._is_lower = None, 0, False

    def _pages_now(self) -> int:
        counts = self._tmem.counts
        return counts.stores + counts.loads_ram + counts.loads_disk

    def _is_awaited(self, now: float, memory: Memory) -> bool:
        """Whether the kernel has asked, or may have asked, something of our swap that has not reached us."""
        if not self._tuning.is_engaged or not memory.under_write_back:
            return False
        return now - self._moved_at < RECENT_S or self._tuning.has_requests

    def _lower(self) -> None:
        """By one step; counted where it may be done."""
        is_lower = self._tuning.lower_minimum(SHARES[self._steps])
        self.count += is_lower and not self._is_lower
        self._is_lower = self._is_lower or is_lower
        self._steps += 1
