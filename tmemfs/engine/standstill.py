"""Standstill: the kernel writes pages to swap, and none of them reaches us.

On its way here a swap write allocates a little. If its worker finds no page above the kernel's minimum watermark, it waits for one,
and what would free one is that write. Priority lets it go below that watermark (host/kworkers.py), but not a worker that waited
already when it got it. Then the watermark is lowered, further and further, until something arrives again.

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
#: Of the watermark, one after the other, each for STILL_S; the last until something moves.
SHARES: Final = (3 / 4, 1 / 2)


class Standstill:
    """Sees that pages go on being asked of `tmem`, and lowers the `watermark` when none is."""

    def __init__(self, tmem: Tmem, watermark: MinimumWatermark | None = None) -> None:
        self._tmem = tmem
        self._watermark = watermark or MinimumWatermark()
        self._pages = 0
        self._since: float | None = None
        self._lowered = 0
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
        elif now - self._since >= STILL_S * (self._lowered + 1) and self._lowered < len(SHARES):
            self._watermark.lower(SHARES[self._lowered])
            self.count += not self._lowered
            self._lowered += 1
        self._pages = pages

    def end(self) -> None:
        """It moves, or nobody looks any more."""
        if self._lowered:
            self._watermark.restore()
            log.warning("swap writes did not reach us for want of memory: the minimum watermark was lowered for a moment")
        self._since, self._lowered = None, 0

    def close(self) -> None:
        """Leave the watermark as it was."""
        self.end()
        self._watermark.close()
