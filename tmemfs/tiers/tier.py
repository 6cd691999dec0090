"""The protocol of a tier: where sealed segments go.

A tier keeps segments in numbered extents of SEGMENT_BYTES. It knows nothing of slots, records and codecs, and it may refuse:
every method raises TierError (BackingFull where it has no space), and a refused write leaves the segment where it was.
All methods block; they are called from threads, several at once, never twice at once for the same extent but to read.
"""

from __future__ import annotations

from typing import NewType, Protocol

Extent = NewType("Extent", int)


class Tier(Protocol):
    """Extents of one segment each."""

    @property
    def name(self) -> str:
        """What a person calls it: a path."""

    @property
    def capacity_bytes(self) -> int:
        """The most it could ever hold."""

    @property
    def sector_bytes(self) -> int:
        """Reads may begin and end at multiples of this: a power of two, BLOCK_BYTES or less."""

    @property
    def can_discard(self) -> bool:
        """Whether `discard` gives space back. It may become False at any time, never True again; then it does nothing."""

    def write(self, extent: Extent, data: memoryview, for_cleaning: bool = False) -> None:
        """Write `data` (borrowed, whole blocks, page-aligned) at the start of `extent`; returns when the tier has it.

        What is written `for_cleaning` may use a reserve, because it frees more than it takes.
        """

    def read(self, extent: Extent, offset: int, into: memoryview) -> None:
        """Fill `into` (whole sectors, page-aligned) from `offset` (a multiple of a sector) of `extent`."""

    def discard(self, extents: tuple[Extent, ...]) -> None:
        """Nothing in `extents` is needed any more: give their space back.

        Raises TierError where that fails this time; all of `extents` may be written again all the same.
        """

    def close(self) -> None:
        """Forget everything and let go of the backing."""
