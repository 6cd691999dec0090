"""Standstill: the kernel writes pages to swap, and none of them reaches us.

On its way here a swap write allocates a little. If its worker finds no page above the kernel's minimum, it waits for one, and what
would free one is that write. Priority lets it go below the minimum (host/kworkers.py), but not a worker that waited already when it
got it. Meanwhile nobody needs the frames that are kept ready for stores: they are given back, and the write finds its page.

Called in trio's thread. Knows nothing of the control law.
"""

from __future__ import annotations

from typing import Final

from tmemfs.host.signals import Memory
from tmemfs.store.tmem import Tmem

#: So long without a store while pages are under write-back; a write that goes on takes milliseconds.
STILL_S: Final = 0.25
#: Less than this share of the reserve to be had without swapping.
SHORT_SHARE: Final = 1 / 2


class Standstill:
    """Whether the frames that `tmem` keeps ready are wanted elsewhere."""

    def __init__(self, tmem: Tmem) -> None:
        self._tmem = tmem
        self._stores = 0
        self._since: float | None = None
        self._kept_bytes: int | None = None
        self.count = 0

    @property
    def is_suspected(self) -> bool:
        """Whether the next look is to come soon, though nothing moves."""
        return self._since is not None

    @property
    def has_given_up(self) -> bool:
        """Whether empty frames were given back: from a standstill until memory is not short any more."""
        return self._kept_bytes is not None

    def look(self, now: float, memory: Memory, reserve_bytes: int) -> None:
        """See whether anything moves."""
        stores = self._tmem.counts.stores
        if memory.available >= SHORT_SHARE * reserve_bytes:
            self.end()
        elif stores != self._stores or not memory.under_write_back:
            self._since = None
        elif self._since is None:
            self._since = now
        elif now - self._since >= STILL_S and not self.has_given_up:
            self._kept_bytes = self._tmem.filled_bytes
            self.count += 1
        self._stores = stores

    def end(self) -> None:
        """Nothing is given up any more."""
        self._since = self._kept_bytes = None

    def limited(self, pool_bytes: int) -> int:
        """What the pool may hold of `pool_bytes`: after a standstill, what was in it then."""
        return pool_bytes if self._kept_bytes is None else min(pool_bytes, self._kept_bytes)
