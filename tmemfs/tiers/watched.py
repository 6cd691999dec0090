"""A tier whose calls are counted as they begin and end, so that a supervisor can tell a disk that hangs from a worker that does.

Thread-safety: any thread, as every tier.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tmemfs.tiers.tier import Extent, Tier


class WatchedTier:
    """`tier`, which counts its calls in `words[begun]` and `words[ended]`."""

    def __init__(self, tier: Tier, words: memoryview, begun: int, ended: int) -> None:
        self.name = tier.name
        self.capacity_bytes = tier.capacity_bytes
        self.most_extents = tier.most_extents
        self.sector_bytes = tier.sector_bytes
        self.is_encrypted = tier.is_encrypted
        self.close = tier.close
        self._tier = tier
        self._words = words
        self._begun = begun
        self._ended = ended
        self._lock = threading.Lock()

    @property
    def can_discard(self) -> bool:
        """See Tier."""
        return self._tier.can_discard

    def write(self, extent: Extent, data: memoryview, sequence: int, for_cleaning: bool = False) -> None:
        """See Tier."""
        with self._counted():
            self._tier.write(extent, data, sequence, for_cleaning)

    def read(self, extent: Extent, offset: int, into: memoryview, sequence: int) -> None:
        """See Tier."""
        # Written out: as a context manager it would cost each load 1 us.
        words, lock = self._words, self._lock
        with lock:
            words[self._begun] += 1
        try:
            self._tier.read(extent, offset, into, sequence)
        finally:
            with lock:
                words[self._ended] += 1

    def discard(self, extents: tuple[Extent, ...]) -> None:
        """See Tier."""
        with self._counted():
            self._tier.discard(extents)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._words[self._begun] += 1
        try:
            yield
        finally:
            with self._lock:
                self._words[self._ended] += 1
