"""A tier in ordinary memory: for tests, and without capacity for a pool that has no backing."""

from __future__ import annotations

from tmemfs.errors import BackingFull, TierError
from tmemfs.tiers.tier import Extent
from tmemfs.units import SECTOR_BYTES


class MemoryTier:
    """Extents as bytes objects; at most `capacity_bytes` of them."""

    name = "memory"
    most_extents: int | None = None
    sector_bytes = SECTOR_BYTES
    can_discard = True
    is_encrypted = False

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.extents: dict[Extent, bytes] = {}

    def write(self, extent: Extent, data: memoryview, sequence: int, for_cleaning: bool = False) -> None:
        """Keep a copy of `data`."""
        if sum(map(len, self.extents.values())) + len(data) > self.capacity_bytes:
            raise BackingFull("the memory tier is full: give it a larger capacity")
        self.extents[extent] = bytes(data)

    def read(self, extent: Extent, offset: int, into: memoryview, sequence: int) -> None:
        """Copy from the extent; what is behind the end of its last write reads as zeros."""
        if extent not in self.extents:
            raise TierError(f"extent {extent} holds nothing: this is a bug in tmemfs, please report it")
        found = self.extents[extent][offset : offset + len(into)]
        into[:] = found + bytes(len(into) - len(found))

    def discard(self, extents: tuple[Extent, ...]) -> None:
        """Drop the copies."""
        for extent in extents:
            self.extents.pop(extent, None)

    def close(self) -> None:
        """Drop all copies."""
        self.extents.clear()
