"""Native dispatch: the two functions that every stored page passes through, and the scan of a start, compiled if they were built.

`TMEMFS_PURE_PYTHON=1` in the environment selects Python although they were built. Constant after import.
"""

from __future__ import annotations

import os
from array import array
from typing import Final, Protocol

from tmemfs.store import codec, recovery
from tmemfs.store.append import Appender
from tmemfs.store.codec import LZ4, Codec, Packed
from tmemfs.store.ledger import Totals
from tmemfs.store.segments import SegmentTable
from tmemfs.store.slots import SlotTable
from tmemfs.store.transitions import Transitions

try:
    from tmemfs.store import compiled
except (ImportError, AttributeError) as error:  # not built, or built of other modules than are here
    WHY_NOT = str(error)
else:
    WHY_NOT = "TMEMFS_PURE_PYTHON is set" if os.environ.get("TMEMFS_PURE_PYTHON", "0") not in ("", "0") else ""

#: Whether the compiled functions are used; if not, WHY_NOT says why.
IS_COMPILED: Final = not WHY_NOT


class AppendsPages(Protocol):
    """Appends encoded pages: append.Appender, or its compiled form."""

    def append(self, first: int, packed: list[Packed], start: int = 0) -> int:
        """See Appender."""


def encode_pages(pages: memoryview, chosen: Codec) -> list[Packed]:
    """(tag, payload) of every page in `pages`, whose length is a multiple of PAGE_BYTES."""
    if IS_COMPILED and chosen.tag == LZ4:
        return compiled.encode_lz4(pages)
    return codec.encode_pages(pages, chosen)


def appender(slots: SlotTable, transitions: Transitions) -> AppendsPages:
    """What appends pages of `slots`, under the store's lock."""
    return compiled.Appender(slots, transitions) if IS_COMPILED else Appender(slots, transitions)


def count_pool(slots: SlotTable, segments: SegmentTable, live: array[int], pages: array[int]) -> Totals:
    """See recovery.CountPool. Raises TmemfsError where a handle refers to nothing."""
    if IS_COMPILED:
        found = compiled.count_pool(slots.handles[: slots.count], segments.words, segments.count, live, pages)
        if found is not None:
            return Totals(*found)
    # The one in Python says what is wrong with a handle.
    return recovery.count_pool(slots, segments, live, pages)
