"""Append: encoded pages become records at the end of the open segments, and slots refer to them.

The pure-Python form. compiled.pyx has the same in C; native.py has the one that is used. Guarded by the store's lock.

Order of a store: record bytes, then fill, then the handle. So a process killed between any two of them loses nothing.
"""

from __future__ import annotations

from typing import Final

from tmemfs.store.codec import RAW, ZERO, Packed
from tmemfs.store.record import RECORD_HEADER_BYTES, TAGS, ZERO_HANDLE, handle_of, mark_gap, start_of, write_record
from tmemfs.store.slots import SlotTable
from tmemfs.store.transitions import Transitions
from tmemfs.units import SEGMENT_BYTES


class Appender:
    """Appends pages of `slots` to the open segments of `transitions`."""

    def __init__(self, slots: SlotTable, transitions: Transitions) -> None:
        self._slots: Final = slots
        self._transitions: Final = transitions
        #: Pages appended by tag, as far as the ledger was not told of them: none between two calls.
        self._pages: Final = [0] * TAGS

    def append(self, first: int, packed: list[Packed], start: int = 0) -> int:
        """Store entries of `packed` from `start` on, for slots first+start, ...; returns how many entries are stored now."""
        transitions, handles, pages = self._transitions, self._slots.handles, self._pages
        arena, lanes = transitions.arena.view, transitions.lanes
        set_fill, drop = transitions.segments.set_fill, transitions.ledger.drop
        fills, record_bytes, payload_bytes = [lanes[0].fill, lanes[1].fill], [0, 0], 0
        slot = first + start
        try:
            for tag, payload in packed[start:] if start else packed:
                if tag == ZERO:
                    handle = ZERO_HANDLE
                else:
                    is_raw = tag == RAW
                    length, lane, fill = len(payload), lanes[is_raw], fills[is_raw]
                    # Packed payloads are too short to touch three blocks.
                    at = start_of(fill, length) if is_raw else fill
                    if at + RECORD_HEADER_BYTES + length > SEGMENT_BYTES:
                        # The segment is to be sealed, and filed by its live bytes: the ledger has to know all of them.
                        self._account(fills, record_bytes, payload_bytes)
                        record_bytes, payload_bytes = [0, 0], 0
                        if not transitions.open_next(lane):
                            break
                        at = 0
                    elif at != fill:
                        mark_gap(arena, lane.base + fill)
                    # A frame starts on a grain of the arena, so the record ends where it would in a view of the frame alone.
                    end = fills[is_raw] = write_record(arena, lane.base + at, tag, slot, payload, lane.seed) - lane.base
                    set_fill(lane.segment, end)
                    payload_bytes += length
                    record_bytes[is_raw] += end - at
                    handle = handle_of(tag, length, at, lane.segment)
                old = handles[slot]
                handles[slot] = handle
                pages[tag] += 1
                if old and (outcome := drop(old)):
                    transitions.dropped(old, outcome)
                slot += 1
        finally:
            self._account(fills, record_bytes, payload_bytes)
        return slot - first

    def _account(self, fills: list[int], record_bytes: list[int], payload_bytes: int) -> None:
        """Tell lanes and ledger what was appended since the last time."""
        packed, raw = self._transitions.lanes
        if record_bytes[0]:
            packed.advance(fills[0])
        if record_bytes[1]:
            raw.advance(fills[1])
        self._transitions.ledger.add(self._pages, payload_bytes, packed.segment, record_bytes[0], raw.segment, record_bytes[1])
