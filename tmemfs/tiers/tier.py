"""The protocol of a tier: where sealed segments go.

A tier keeps segments in numbered extents of SEGMENT_BYTES. It knows nothing of slots, records and codecs. It may refuse: every
method raises TierError (BackingFull where it has no space), and a refused write leaves the segment where it was. All methods block.
Several threads call them at once, but no two at once for the same extent, except to read it.

A new tier is a class with these methods, in a file of its own beside this one. It inherits nothing. supervisor.serve makes the one
that a daemon uses; store/ and jobs/ know the protocol alone.
"""

from __future__ import annotations

from typing import Final, NewType, Protocol

Extent = NewType("Extent", int)

#: Segments that are written at once, at most: each takes a thread, and where the tier encrypts, a buffer of a segment.
MOST_WRITERS: Final = 3


class Tier(Protocol):
    """Extents of one segment each."""

    @property
    def name(self) -> str:
        """The name for messages: a path."""

    @property
    def capacity_bytes(self) -> int:
        """The most bytes that it can hold."""

    @property
    def most_extents(self) -> int | None:
        """The most extents that it can ever have; None if its capacity may grow."""

    @property
    def sector_bytes(self) -> int:
        """Reads may begin and end at multiples of this: a power of two, BLOCK_BYTES or less."""

    @property
    def can_discard(self) -> bool:
        """Whether `discard` frees space. It may become False at any time, and never True again; `discard` then does nothing."""

    @property
    def is_encrypted(self) -> bool:
        """Whether what lies there is encrypted."""

    def write(self, extent: Extent, data: memoryview, sequence: int, for_cleaning: bool = False) -> None:
        """Write `data` (borrowed, whole blocks, page-aligned) at the start of `extent`; returns when the tier has it.

        `sequence` is that of the segment: the same number again means the same data again.

        A write `for_cleaning` may use a reserve, because cleaning frees more space than it takes.
        """

    def read(self, extent: Extent, offset: int, into: memoryview, sequence: int) -> None:
        """Fill `into` (whole sectors, page-aligned) from `offset` (a multiple of a sector) of `extent`, written as `sequence`."""

    def discard(self, extents: tuple[Extent, ...]) -> None:
        """Free the space of `extents`, whose contents are not needed any more.

        Raises TierError if that fails this time. All of `extents` may be written again in either case.
        """

    def close(self) -> None:
        """Forget everything and close the backing."""
