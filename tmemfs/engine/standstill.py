"""Standstill: the kernel writes pages to swap, and none of them reaches us.

On its way here a swap write allocates a little. If its worker finds no page above the kernel's minimum watermark, it waits for one,
and what would free one is that write. Priority lets it go below that watermark (host/kworkers.py), but not a worker that waited
already when it got it. Then the watermark is lowered, in steps, until something arrives again, for LONGEST_S at most.

Files under write-back that hang, and a disk that takes long with what reached us, look the same: then the watermark is lowered for
nothing.

Called in trio's thread. Knows nothing of the control law.
"""

from __future__ import annotations

import logging
from typing import Final

from tmemfs.host.signals import Memory
from tmemfs.host.watermark import MinimumWatermark
from tmemfs.store.tmem import Tmem

log = logging.getLogger(__name__)

#: So long without a page stored or loaded while pages are under write-back; a write that goes on takes milliseconds.
STILL_S: Final = 0.25
#: Less than this share of the reserve to be had without swapping.
SHORT_SHARE: Final = 1 / 2
#: Of the watermark, one after the other, each for STILL_S.
SHARES: Final = (3 / 4, 1 / 2)
#: What has not helped so long after the standstill began will not: it is something else. It is tried again after a pause.
LONGEST_S: Final = 2.0
PAUSE_S: Final = 10.0


class Standstill:
    """Sees that pages go on being asked of `tmem`, and lowers the `watermark` when none is."""

    def __init__(self, tmem: Tmem, watermark: MinimumWatermark | None = None) -> None:
        self._tmem = tmem
        self._watermark = watermark or MinimumWatermark()
        self._pages = 0
        self._since: float | None = None
        self._steps = 0
        self._is_lower = False
        self.count = 0

    @property
    def is_suspected(self) -> bool:
        """Whether the next look is to come soon, though nothing moves."""
        return self._since is not None

    def look(self, now: float, memory: Memory, reserve_bytes: int) -> None:
        """See whether anything moves."""
        counts = self._tmem.counts
        pages, before = counts.stores + counts.loads_ram + counts.loads_disk, self._pages
        if pages != before or not memory.under_write_back or memory.available >= SHORT_SHARE * reserve_bytes:
            self.end()
        elif self._since is None:
            self._since = now
        elif now - self._since >= LONGEST_S:
            self.end()
            self._since = now + PAUSE_S
        elif self._steps < len(SHARES) and now - self._since >= STILL_S * (self._steps + 1):
            self._lower()
        self._pages = pages

    def end(self) -> None:
        """It moves, or nobody looks any more."""
        self._watermark.restore()
        if self._is_lower:
            log.warning("no page was stored or loaded while memory was short: the minimum watermark was lowered for a moment")
        self._since, self._steps, self._is_lower = None, 0, False

    def _lower(self) -> None:
        """By one step; counted where it may be done."""
        is_lower = self._watermark.lower(SHARES[self._steps])
        self.count += is_lower and not self._is_lower
        self._is_lower = self._is_lower or is_lower
        self._steps += 1

    def close(self) -> None:
        """Leave the watermark as it was."""
        self.end()
        self._watermark.close()
