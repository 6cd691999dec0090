"""Copies the live records of a merge, outside the lock: records that were dropped meanwhile are left out, live ones are verified.

A record that is damaged stays where it is, and so does its segment. A source that does not fit as a whole stays too; but where
records are re-encoded, the part of it that fits is moved.

Thread-safety: any number of copies at once, each by one thread. A handle that changes while its record is copied does no harm: the
commit of the merge moves only handles that are still the same.

Invariant: 1. Whatever is copied has verified as the record of its slot, in its segment.
"""

from __future__ import annotations

import threading
from struct import error as StructError
from typing import Final

from tmemfs.errors import Corrupt
from tmemfs.store.dictionary import Dictionaries, Dictionary, read_dictionary
from tmemfs.store.merge_plans import Copied, Merge, MergeCounts, Pause, Recode, Source, no_pause
from tmemfs.store.record import RECORD_HEADER_BYTES, handle_of, mark_gap, read_record, scan, start_of, write_record
from tmemfs.store.slots import SlotTable
from tmemfs.units import SEGMENT_BYTES


def keep(tag: int, payload: memoryview) -> tuple[int, memoryview]:
    """The record as it is."""
    return tag, payload


class RecordCopier:
    """Copies records that `slots` refers to. `lock` guards `dictionaries` and `counts`."""

    def __init__(self, lock: threading.Lock, slots: SlotTable, dictionaries: Dictionaries, counts: MergeCounts) -> None:
        self._lock: Final = lock
        self._slots: Final = slots
        self._dictionaries: Final = dictionaries
        self._counts: Final = counts

    def copy_in_ram(self, plan: Merge, pause: Pause = no_pause, recode: Recode = keep) -> Copied:
        """Copy the live records of all sources of a merge in RAM, as far as it fits."""
        assert plan.into is not None
        copied = Copied(plan.into)
        for source in plan.sources:
            if source.data is not None and not copied.is_full:
                self.copy(plan, source, source.data, copied, pause, recode)
        return copied

    def copy(
        self,
        plan: Merge,
        source: Source,
        data: memoryview,
        copied: Copied,
        pause: Pause = no_pause,
        recode: Recode = keep,
    ) -> None:
        """Copy the live records of `source`, whose bytes are `data`, behind what is `copied`, until that is full.

        `pause` is called after each record, `recode` before it is copied. A source that does not fit as a whole is not copied,
        unless records are re-encoded: then the next merge can take the rest of it.
        """
        fill, moves_before = copied.fill, len(copied.moves)
        try:
            self._copy_records(plan, source, data, copied, pause, recode)
        except (StructError, Corrupt):  # a damaged length led past the end, or the dictionary is damaged
            copied.damaged.add(source.segment)
        if copied.is_full and recode is keep:
            # Half a source frees no segment, and costs as much as the part of it that was copied.
            copied.fill = fill
            del copied.moves[moves_before:]
        elif not copied.is_full and source.segment not in copied.damaged:
            copied.emptied.append(source)

    def _copy_records(self, plan: Merge, source: Source, data: memoryview, copied: Copied, pause: Pause, recode: Recode) -> None:
        """Copy records until there are no more or `copied` is full. Raises StructError and Corrupt where `data` is damaged."""
        handles, into = self._slots.handles, copied.into
        slots, of_source, of_target = len(handles), source.seed, plan.seed
        if plan.dictionary and not copied.fill:
            copied.fill = self._dictionary(plan, source, data).write_to(into, of_target)
        for offset, slot, tag, length in scan(data, source.fill):
            old = handle_of(tag, length, offset, source.segment)
            # A slot that refers to another place has been stored again or invalidated. A damaged one may be any number.
            if slot >= slots or handles[slot] != old:
                continue
            try:
                found = read_record(data, offset, slot, tag, length, of_source)
                tag, payload = recode(tag, found)
            except Corrupt:
                self._damaged(source, copied)
                continue
            length = len(payload)
            at = start_of(copied.fill, length)
            if at + RECORD_HEADER_BYTES + length > SEGMENT_BYTES:
                copied.is_full = True
                return
            if at != copied.fill:
                mark_gap(into, copied.fill)
            copied.fill = write_record(into, at, tag, slot, payload, of_target)
            copied.moves.append((slot, old, handle_of(tag, length, at, plan.target)))
            pause()

    def _damaged(self, source: Source, copied: Copied) -> None:
        copied.damaged.add(source.segment)
        with self._lock:  # any number of threads copy
            self._counts.damaged_records += 1

    def _dictionary(self, plan: Merge, source: Source, data: memoryview) -> Dictionary:
        """The dictionary of `plan`, which is that of `source` if it is not known. Raises Corrupt."""
        found = self._dictionaries.known(plan.dictionary)
        if found is None:
            start = read_dictionary(data, source.seed)
            with self._lock:
                found = self._dictionaries.adopt(plan.dictionary, start)
        return found
