"""The recorder: a pager that notes what it is asked, and answers as any pager does.

What is noted is the request as it came, whether or not it is granted; a store with the lengths of the payloads that the pager
encoded anyway, so nothing is compressed twice. A page that `load_page` has not in RAM is noted by the `read_page` that follows.

Left out: parts of pages, which swap never stores and a trace has no word for, and what comes when the recording is full. They
are counted. The recording grows in memory and is written when all is over: this is no tool for a machine without memory to spare.

Thread-safety: the requests of a mount come from one thread, which is the only one that notes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from tmemfs.pages.free_frames import Room
from tmemfs.pages.pager import Deferred, Pager, _Patch, _Run
from tmemfs.pages.reader import Reader
from tmemfs.store.codec import Codec, Packed
from tmemfs.store.tmem import Tmem
from tmemfs.units import PAGE_BYTES
from tools.trace.format import DISCARD, LOAD, STORE, Columns

#: 25 bytes each in memory, 3 to 4 in the file.
MOST_REQUESTS: Final = 2_000_000
#: Payload lengths, of 2 bytes each.
MOST_PAGES: Final = 8_000_000


class Recording:
    """Requests as they come, with the time since this was made; `left_out` counts those it could not take."""

    def __init__(self, most_requests: int = MOST_REQUESTS, most_pages: int = MOST_PAGES) -> None:
        self.columns = Columns()
        self.left_out = 0
        self._most_requests = most_requests
        self._most_pages = most_pages
        self._started_ns = time.monotonic_ns()

    def note(self, operation: int, first: int, count: int, payloads: Sequence[int] = ()) -> None:
        """One request, now."""
        columns = self.columns
        if len(columns) >= self._most_requests or len(columns.payloads) + len(payloads) > self._most_pages:
            self.left_out += 1
            return
        columns.append((time.monotonic_ns() - self._started_ns) // 1000, operation, first, count, payloads)


class RecordingPager(Pager):
    """A pager whose requests are noted in `recording`."""

    def __init__(self, tmem: Tmem, reader: Reader, room: Room, codec: Codec, recording: Recording) -> None:
        super().__init__(tmem, reader, room, codec)
        self.load_page = self._load_page
        self._recording = recording

    def read(self, offset: int, size: int) -> bytes | Deferred:
        """Note the pages touched, and read."""
        end = min(offset + size, self.swap_bytes)
        first = offset // PAGE_BYTES
        if offset < end:
            self._recording.note(LOAD, first, -(-end // PAGE_BYTES) - first)
        return super().read(offset, size)

    def read_page(self, slot: int) -> bytes | Deferred:
        """Note the page, and read it."""
        self._recording.note(LOAD, slot, 1)
        return super().read_page(slot)

    def discard(self, offset: int, length: int) -> Deferred | None:
        """Note the whole pages, and discard."""
        end = min(offset + length, self.swap_bytes)
        first, last = -(-offset // PAGE_BYTES), end // PAGE_BYTES
        if first < last:
            self._recording.note(DISCARD, first, last - first)
        self._recording.left_out += bool((offset | end) % PAGE_BYTES)
        return super().discard(offset, length)

    def _load_page(self, slot: int) -> bytes | None:
        page = self._tmem.load(slot)
        if page is not None:
            self._recording.note(LOAD, slot, 1)
        return page

    def _store(self, first: int, packed: list[Packed]) -> Deferred | None:
        """Note whole pages, and store them."""
        self._note_store(first, packed)
        return super()._store(first, packed)

    def _steps(self, offset: int, data: memoryview) -> list[_Run | _Patch]:
        """The steps of a write that has parts of pages, its whole pages noted."""
        steps = super()._steps(offset, data)
        for step in steps:
            if isinstance(step, _Run):
                self._note_store(step.first, step.packed)
            else:
                self._recording.left_out += 1
        return steps

    def _note_store(self, first: int, packed: list[Packed]) -> None:
        self._recording.note(STORE, first, len(packed), [len(payload) for _, payload in packed])
