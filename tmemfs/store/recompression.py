"""Recompression: re-encodes idle segments in RAM, which are next in line for the tier, with zstd and a dictionary.

This module decides which segments are idle, what a dictionary is trained on, and whether the result is kept. The caller performs
the merges, off the path of stores, loads and shrinks. A segment is idle if it was sealed before the previous look and was not
loaded from since. A result is kept if it saves a tenth, its dictionary counted. Segments that do not save that are not tried again.

Thread-safety: one thread at a time; takes the store's lock itself.

Invariant: 1. A record is re-encoded only from a page that was decoded from verified bytes, and only if that makes it shorter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from struct import error as StructError
from typing import Final

from tmemfs.errors import Corrupt
from tmemfs.policy.cleaning import saves_enough
from tmemfs.store.codec import LZ4, ZSTD_DICT, decode
from tmemfs.store.dictionary import Encoder
from tmemfs.store.merge_plans import Copied, Merge
from tmemfs.store.record import SegmentId, handle_of, handle_record_bytes, read_record, scan, segment_seed
from tmemfs.store.segments import LANE_PACKED, SEALED
from tmemfs.store.tmem import Tmem
from tmemfs.units import SEGMENT_BYTES

#: Live bytes taken for one merge: they fill its segment if a quarter is left of them. What does not fit stays for the next merge.
_AT_ONCE_BYTES: Final = 4 * SEGMENT_BYTES
#: Pages a dictionary is trained on: 0.688 of lz4's bytes, as with 400, in 1.8 MB of memory.
SAMPLES: Final = 128

#: Copied under one hold of the lock: 5 us.
_COPY_BYTES: Final = 32 << 10

Use = tuple[SegmentId, int]
"""A segment and its sequence."""


@dataclass(slots=True)
class RecompressionCounts:
    """Since the start. Segments made, records re-encoded, bytes saved by that; merges that were not worth keeping."""

    segments: int = 0
    records: int = 0
    saved_bytes: int = 0
    not_worth: int = 0


class Recompression:
    """Plans the recompression of `tmem`."""

    def __init__(self, tmem: Tmem) -> None:
        self.counts = RecompressionCounts()
        self._tmem = tmem
        self._lane = tmem.lanes[LANE_PACKED]
        self._not_worth: set[int] = set()
        self._sealed_before = 0

    def look(self, encoder: Encoder | None) -> deque[Use]:
        """Segments that are idle now, the oldest first. Forgets dictionaries that no segment has, except that of `encoder`."""
        table = self._tmem.segments
        in_use = table.dictionaries() | {encoder.dictionary.number if encoder else 0}
        with self._tmem.lock:
            self._tmem.dictionaries.keep_only(in_use)
            sealed = list(self._lane.sealed)
            idle_before, self._sealed_before = self._sealed_before, table.next_sequence
        # Without the lock, as there may be thousands. One that is used again meanwhile has a new sequence, and so is not idle.
        in_line = [(segment, table.sequence(segment)) for segment in sealed]
        self._not_worth.intersection_update(sequence for _, sequence in in_line)
        return deque(use for use in in_line if use[1] < idle_before and self._may_gain(use))

    def samples(self, uses: deque[Use]) -> list[bytes]:
        """SAMPLES live pages of `uses`, from all of them alike."""
        # From as many segments as possible: neighbours were stored together, and resemble each other more than the rest.
        each = -(-SAMPLES // max(len(uses), 1))
        found: list[bytes] = []
        into = memoryview(bytearray(SEGMENT_BYTES))
        for use in islice(uses, 0, None, max(len(uses) // SAMPLES, 1)):
            found += self._pages_of(use, self._copy_of(use, into), each)
        return found[:SAMPLES]

    def _copy_of(self, use: Use, into: memoryview) -> memoryview:
        """What `use` holds, copied to `into` in small steps; nothing, if it left the line meanwhile.

        Its frame may be released at any time without the lock. A read of it would have the system fault in memory for it again.
        """
        segment, _ = use
        table, fill = self._tmem.segments, 0
        for at in range(0, SEGMENT_BYTES, _COPY_BYTES):
            with self._tmem.lock:
                if not self._is_in_line(use):
                    return into[:0]
                fill = table.fill(segment)
                frame = self._tmem.arena.frame_view(table.frame(segment))
                into[at : at + _COPY_BYTES] = frame[at : at + _COPY_BYTES]
            # What lies behind the fill is not part of any record.
            if at + _COPY_BYTES >= fill:
                break
        return into[:fill]

    def plan(self, uses: deque[Use], encoder: Encoder) -> Merge | None:
        """Take the first of `uses` for one merge; None if nothing is left of them, or there is no frame to do it in."""
        chosen, live = list[SegmentId](), 0
        with self._tmem.lock:
            while uses and live < _AT_ONCE_BYTES:
                segment, _ = use = uses.popleft()
                if self._is_in_line(use) and self._may_gain(use):
                    chosen.append(segment)
                    live += self._tmem.ledger.live[segment]
            # Planned under the same hold of the lock: a shrink might take one of them otherwise.
            return self._tmem.merges.plan_merge(self._lane, chosen, encoder.dictionary.number) if chosen else None

    def commit(self, plan: Merge, copied: Copied) -> bool:
        """Keep what was `copied`, if that saves enough; whether it was kept."""
        # The fill of the target has its dictionary in it, which the sources had not.
        before = sum(handle_record_bytes(old) for _, old, _ in copied.moves)
        # Each load of what is kept takes longer, so a small gain is not worth it.
        if not saves_enough(before, copied.fill):
            self._tmem.merges.abort(plan, copied.damaged)
            self.counts.not_worth += 1
            return False
        self._tmem.merges.commit(plan, copied)
        self.counts.segments += 1
        self.counts.records += len(copied.moves)
        self.counts.saved_bytes += before - copied.fill
        return True

    def give_up(self, plan: Merge) -> None:
        """Do not try the sources of `plan` again."""
        with self._tmem.lock:
            self._not_worth.update(self._tmem.segments.sequence(source.segment) for source in plan.sources)

    def left_of(self, plan: Merge) -> list[Use]:
        """Sources of `plan` that did not fit: the next to re-encode."""
        with self._tmem.lock:
            uses = [(source.segment, self._tmem.segments.sequence(source.segment)) for source in plan.sources]
            return [use for use in uses if self._is_in_line(use) and self._may_gain(use)]

    def _is_in_line(self, use: Use) -> bool:
        segment, sequence = use
        table = self._tmem.segments
        return table.state(segment) == SEALED and table.sequence(segment) == sequence

    def _may_gain(self, use: Use) -> bool:
        segment, sequence = use
        table = self._tmem.segments
        # Pages that are loaded often are to stay cheap to decode. Those with a dictionary are done.
        if table.loaded[segment] or table.dictionary(segment) or sequence in self._not_worth:
            return False
        return self._tmem.merges.can_be_emptied(segment)

    def _pages_of(self, use: Use, data: memoryview, most: int) -> list[bytes]:
        """Up to `most` live pages that lz4 has encoded, from all over `data`, a copy of the segment."""
        segment, sequence = use
        handles, seed = self._tmem.slots.handles, segment_seed(sequence)
        slots = len(handles)
        pages: list[bytes] = []
        step = max(self._tmem.ledger.pages[segment] // most, 1)
        for offset, slot, tag, length in islice(_records(data), 0, None, step):
            if len(pages) < most and tag == LZ4 and slot < slots and handles[slot] == handle_of(tag, length, offset, segment):
                try:
                    pages.append(decode(tag, read_record(data, offset, slot, tag, length, seed)))
                except Corrupt:
                    # A sample less does no harm. The copy of the record will report it.
                    continue
        return pages


def _records(data: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """What `scan` returns; a damaged length that leads past the end ends it."""
    with suppress(StructError):
        yield from scan(data, len(data))


def reencode(encoder: Encoder, tag: int, payload: memoryview) -> tuple[int, bytes | memoryview]:
    """A record of lz4 with the dictionary of `encoder`, if that makes it shorter; others as they are. Raises Corrupt."""
    if tag == LZ4:
        shorter = encoder.encode(decode(tag, payload))
        if len(shorter) < len(payload):
            return ZSTD_DICT, shorter
    return tag, payload
