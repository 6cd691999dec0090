"""Insert: encoded pages become records at the end of the open segments, and slots refer to them.

The pure-Python form; compiled.pyx is the same in C, and native.py has the one that is used. Guarded by the store's lock.

Order of a store: record bytes, then fill, then the handle, so that a process killed between any two of them loses nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tmemfs.store.codec import RAW, ZERO, Packed
from tmemfs.store.record import RECORD_HEADER_BYTES, ZERO_HANDLE, handle_of, mark_gap, start_of, write_record
from tmemfs.units import SEGMENT_BYTES

if TYPE_CHECKING:
    from tmemfs.store.tmem import Tmem


class Appender:
    """Stores encoded pages in `tmem`."""

    def __init__(self, tmem: Tmem) -> None:
        self._tmem = tmem

    def append(self, first: int, packed: list[Packed], start: int = 0) -> int:
        """Store entries of `packed` from `start` on, for slots first+start, ...; gives how many entries are stored now."""
        tmem = self._tmem
        handles = tmem.slots.handles
        segments = tmem.segments
        live, pages = segments.live, segments.pages
        arena = tmem.arena.view
        by_tag = tmem.pages_by_tag
        slot = first + start
        compressed_bytes = live_bytes = 0
        for tag, payload in packed[start:] if start else packed:
            if tag == ZERO:
                handle = ZERO_HANDLE
            else:
                length = len(payload)
                lane = tmem.lanes[tag == RAW]
                at = lane.fill if tag != RAW else start_of(lane.fill, length)
                if at + RECORD_HEADER_BYTES + length > SEGMENT_BYTES:
                    if not tmem.open_next(lane):
                        break
                    at = 0
                elif at != lane.fill:
                    mark_gap(arena, lane.base + lane.fill)
                segment = lane.segment
                # A frame starts on a grain of the arena, so the record ends where it would in a view of the frame alone.
                end = write_record(arena, lane.base + at, tag, slot, payload, lane.seed) - lane.base
                lane.fill = end
                segments.set_fill(segment, end)
                live[segment] += end - at
                live_bytes += end - at
                pages[segment] += 1
                compressed_bytes += length
                handle = handle_of(tag, length, at, segment)
            old = handles[slot]
            handles[slot] = handle
            by_tag[tag] += 1
            if old:
                tmem.drop(old)
            slot += 1
            if tag == RAW:
                tmem.counts.raw_stores += 1
        tmem.compressed_bytes += compressed_bytes
        tmem.live_bytes += live_bytes
        tmem.counts.stored_bytes += compressed_bytes
        tmem.counts.stores += slot - first - start
        return slot - first
