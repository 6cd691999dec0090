"""Swap stalls: the kernel writes pages to swap, and none of them reaches us.

On its way here a swap write allocates a little. If the kernel worker that sends it finds no page above the kernel's minimum
watermark, it waits for one, and what would free one is that write. A real-time priority lets the worker allocate below that
watermark (system/kworkers.py), except for one that waited already when it was given the priority. So the watermark is lowered, in
steps, until a page arrives again, for LONGEST_S at most.

Our swap can only be what waits if it is on (kernel_tuning.py), and if its loop device has requests or had some a moment ago. So an
idle mount never lowers anything for what happens elsewhere.

A disk that takes long over what has reached us looks the same in a sample. Then the watermark is lowered for nothing.

Called in trio's thread. Knows nothing of the pressure controller.
"""

from __future__ import annotations

import logging
import math
from typing import Final

from tmemfs.jobs.kernel_tuning import KernelTuning
from tmemfs.store.tmem import Tmem
from tmemfs.system.kernel_settings import MINIMUM
from tmemfs.system.kernel_settings import SHARES as ALL_SHARES
from tmemfs.system.pressure_signals import Memory

log = logging.getLogger(__name__)

#: So long without a page stored or loaded while pages are under write-back; a write that goes on takes milliseconds.
STILL_S: Final = 0.25
#: Memory is short if less than this share of the reserve is available without swapping.
SHORT_SHARE: Final = 1 / 2
#: Shares of the watermark that are tried one after the other, each for STILL_S.
SHARES: Final = ALL_SHARES[MINIMUM]
#: What has not helped this long after the stall began will not, for its cause is another. It is tried again after a pause.
LONGEST_S: Final = 2.0
PAUSE_S: Final = 10.0
#: The kernel may hold a request back before it counts it at the device, so the swap counts as in use for this long after a page.
RECENT_S: Final = 2.0


class SwapStallDetector:
    """Lowers the minimum watermark by `tuning` while memory is short and no page of `tmem` is asked for."""

    def __init__(self, tmem: Tmem, tuning: KernelTuning) -> None:
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
        """Whether the next sample is to come soon, although no page is stored or loaded."""
        return self._since is not None

    def sample(self, now: float, memory: Memory, reserve_bytes: int) -> None:
        """Take a sample at `now`, in seconds of any clock that does not run backwards."""
        pages, before = self._pages_now(), self._pages
        self._pages = pages
        if pages != before:
            self._moved_at = now
        # Something was asked of us, or memory is not short, or nothing is on its way here: no stall.
        if pages != before or memory.available >= SHORT_SHARE * reserve_bytes or not self._is_awaited(now, memory):
            self.end()
        elif self._since is None:
            self._since = now
        elif now - self._since >= LONGEST_S:
            self.end()
            self._since = now + PAUSE_S  # in the future: until then none of these times has passed
        elif self._steps < len(SHARES) and now - self._since >= STILL_S * (self._steps + 1):
            self._lower()
        elif self._is_lower:  # again at each sample: another daemon may have restored it, for it does not know of us
            self._tuning.lower_minimum(SHARES[self._steps - 1])

    def end(self) -> None:
        """The stall is over, or nobody takes samples any more: restore the watermark."""
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
        """Lower the watermark by one step. A stall is counted once, and only if the watermark could be lowered."""
        is_lower = self._tuning.lower_minimum(SHARES[self._steps])
        self.count += is_lower and not self._is_lower
        self._is_lower = self._is_lower or is_lower
        self._steps += 1  # also where it could not be lowered: `sample` ends the attempt after LONGEST_S
