"""The recorder: a pager that notes its requests, and answers them as any pager does.

It notes each request as it comes, whether or not the request is granted. A store is noted with the lengths of its payloads. They
are encoded once more for that, so that the recorder needs only what a pager offers to everybody.

It leaves out, and counts, parts of pages, which swap never sends and a trace cannot express, and requests after the recording is
full. The recording grows in memory and is written at the end, so this tool needs a machine with free memory.

Thread-safety: one thread at a time, the leader of the page path, reads a mount's requests, and it is the only one that notes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from tmemfs.pages.free_frames import FreeFrames
from tmemfs.pages.pager import Deferred, Pager
from tmemfs.pages.reader import Reader
from tmemfs.store.codec import Codec
from tmemfs.store.native import encode_pages
from tmemfs.store.tmem import Tmem
from tmemfs.units import PAGE_BYTES
from tools.trace.format import DISCARD, LOAD, STORE, Columns

#: 25 bytes each in memory, 3 to 4 in the file.
MOST_REQUESTS: Final = 2_000_000
#: Payload lengths, of 2 bytes each.
MOST_PAGES: Final = 8_000_000


class Recording:
    """Requests as they come, with the time since the recording began; `left_out` counts those that do not fit."""

    def __init__(self, most_requests: int = MOST_REQUESTS, most_pages: int = MOST_PAGES) -> None:
        self.columns = Columns()
        self.left_out = 0
        self._most_requests = most_requests
        self._most_pages = most_pages
        self._started_ns = time.monotonic_ns()

    def note(self, operation: int, first: int, count: int, payloads: Sequence[int] = ()) -> None:
        """Note one request, with the time of now."""
        columns = self.columns
        if len(columns) >= self._most_requests or len(columns.payloads) + len(payloads) > self._most_pages:
            self.left_out += 1
            return
        columns.append((time.monotonic_ns() - self._started_ns) // 1000, operation, first, count, payloads)


class RecordingPager(Pager):
    """A pager whose requests are noted in `recording`."""

    def __init__(self, tmem: Tmem, reader: Reader, free_frames: FreeFrames, codec: Codec, recording: Recording) -> None:
        super().__init__(tmem, reader, free_frames, codec)
        self._load = self.load_page
        self.load_page = self._load_and_note
        self._recording = recording

    def read(self, offset: int, size: int) -> bytes | Deferred:
        """Note the pages touched, and read."""
        end = min(offset + size, self.swap_bytes)
        first = offset // PAGE_BYTES
        if offset < end:
            self._recording.note(LOAD, first, -(-end // PAGE_BYTES) - first)
        return super().read(offset, size)

    def write(self, offset: int, data: memoryview) -> Deferred | None:
        """Note the whole pages, and store."""
        if offset + len(data) <= self.swap_bytes:
            self._note_store(offset, data)
        return super().write(offset, data)

    def discard(self, offset: int, length: int) -> Deferred | None:
        """Note the whole pages, and discard."""
        end = min(offset + length, self.swap_bytes)
        first, last = -(-offset // PAGE_BYTES), end // PAGE_BYTES
        if first < last:
            self._recording.note(DISCARD, first, last - first)
        self._recording.left_out += bool((offset | end) % PAGE_BYTES)
        return super().discard(offset, length)

    def _load_and_note(self, slot: int) -> bytes | None:
        # Also a page that is not in RAM: the `read_page` that follows may come from another thread.
        self._recording.note(LOAD, slot, 1)
        return self._load(slot)

    def _note_store(self, offset: int, data: memoryview) -> None:
        end = offset + len(data)
        first, last = -(-offset // PAGE_BYTES), end // PAGE_BYTES
        whole = max(last - first, 0)
        if whole:
            pages = data[first * PAGE_BYTES - offset : last * PAGE_BYTES - offset]
            self._recording.note(STORE, first, whole, [len(payload) for _, payload in encode_pages(pages, self.codec)])
        self._recording.left_out += -(-end // PAGE_BYTES) - offset // PAGE_BYTES - whole
