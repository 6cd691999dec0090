"""The slot table: one 64-bit handle per swap slot, in a region of its own.

A handle is written with one 8-byte write, after everything else that a store writes. So a slot never refers to anything unfinished.
Knows nothing of what handles mean (record.py does).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tmemfs.store.region import Region

SLOT_BYTES: Final = 8
_STRIDE: Final = 512
_EMPTY_STRIDE: Final = bytes(_STRIDE * SLOT_BYTES)


class SlotTable:
    """`count` handles. `handles` is the memoryview the page path reads and writes."""

    __slots__ = ("count", "handles", "region")

    def __init__(self, count: int, region: Region | None = None) -> None:
        self.count = count
        self.region = region or Region("slots", count * SLOT_BYTES)
        self.handles = self.region.words()

    def occupied(self, first: int, end: int) -> Iterator[int]:
        """Slots in [first, end) with a handle; empty strides of 512 slots cost one comparison each."""
        view = self.region.view
        for start in range(first, end, _STRIDE):
            stop = min(start + _STRIDE, end)
            stride = bytes(view[start * SLOT_BYTES : stop * SLOT_BYTES])
            # Compared as bytes: most of a swap area is empty, and a discard of all of it must not look at each slot.
            if stride != _EMPTY_STRIDE[: len(stride)]:
                handles = self.handles
                yield from (slot for slot in range(start, stop) if handles[slot])
