"""The pool's size: the one owner of the arena's limit.

Three things limit the pool at once, and each is changed by itself: `pool.max`; the lower one that is being approached, until it is
reached or given up; and what memory pressure allows. The least of them is the arena's limit, whatever order they change in.

Called in trio's thread. Knows nothing of who shrinks the pool to its limit.
"""

from __future__ import annotations

import math

from tmemfs.store.tmem import Tmem
from tmemfs.units import SEGMENT_BYTES


class PoolSize:
    """What the pool of `tmem` may hold; `max_bytes` begins as its arena's limit."""

    def __init__(self, tmem: Tmem) -> None:
        self.max_bytes = tmem.arena.limit * SEGMENT_BYTES
        self._tmem = tmem
        self._approached = math.inf
        self._allowed = math.inf

    @property
    def limit_bytes(self) -> int:
        """The limit in force."""
        return int(min(self.max_bytes, self._approached, self._allowed))

    def approach(self, limit_bytes: int) -> None:
        """Hold no more than `limit_bytes`, until `set_max` or `give_up`."""
        self._approached = limit_bytes
        self._apply()

    def give_up(self) -> None:
        """What was approached cannot be reached: the maximum stays what it was."""
        self._approached = math.inf
        self._apply()

    def set_max(self, max_bytes: int) -> None:
        """Let the maximum be `max_bytes` from now on."""
        self.max_bytes = max_bytes
        self._approached = math.inf
        self._apply()

    def allow(self, limit_bytes: float) -> None:
        """Memory pressure allows `limit_bytes`; inf: as much as there may be."""
        self._allowed = limit_bytes
        self._apply()

    def _apply(self) -> None:
        self._tmem.limit_pool(self.limit_bytes)
