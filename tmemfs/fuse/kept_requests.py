"""Kept requests: what was read from the kernel and is not answered yet stays in the shared region, raw, for the next worker.

From Linux 6.9 on the kernel hands such requests out again when it is asked to (wire.RESEND). Nothing is kept there: the region has
one buffer, and every method here returns at once. On an older kernel a request that a worker took with it would never be answered,
and the process that waits for it would never end.

    offset          content
    0               two words per place: the `unique` that is done, all but its reply, and the errno of that reply
    3 * 4096        reply of a page from RAM
    5 * 4096        buffers: one page for the head of a request, 65 for its data
    then            entries of ENTRY_BYTES: whole requests that are small

A request is read into the current buffer and stays there while it is handled. Only if its answer is deferred does it need a place
for longer. A WRITE to the image keeps its buffer, and the leader goes on with a free one. Others are copied to an entry.

A WRITE or a discard must not be done again once the kernel has its answer: newer data may be there by then. So the place says first
that it is done, then the reply is sent, and a next worker only sends that reply again. Every other request may be handled twice.
The kernel refuses an answer that it has had.

What finds no place is answered with EIO by the next worker, if there is an entry for its head. That takes more WRITEs to the image
than BUFFERS without an answer; the loop device has REQUESTS_UNDER_WAY at most.

Thread-safety: any thread; the leader alone reads requests.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Final

from tmemfs.fuse import wire
from tmemfs.store.region import Region
from tmemfs.units import PAGE_BYTES

#: Those of the loop device, the one that is being read, and one for a program that writes to the image itself.
BUFFERS: Final = wire.REQUESTS_UNDER_WAY + 2
#: A lookup of the longest name, and any value that is usual for a control file.
ENTRY_BYTES: Final = 384
ENTRIES: Final = 512
#: Entries that requests for control files leave to those for pages: thousands of the former may be under way.
PAGE_ENTRIES: Final = 64
_DONE_PAGES: Final = 3
_REPLY_AT: Final = _DONE_PAGES * PAGE_BYTES
_REPLY_PAGES: Final = 2
_BUFFERS_AT: Final = _REPLY_AT + _REPLY_PAGES * PAGE_BYTES
_DATA_BYTES: Final = wire.REQUEST_BYTES + PAGE_BYTES
_BUFFER_BYTES: Final = PAGE_BYTES + _DATA_BYTES


@dataclass(frozen=True, slots=True)
class LeftOver:
    """A request that an earlier worker read and, perhaps, did not answer, at `place`.

    `data` is None where it was not kept. `done` is the errno of its reply if only that is left to send, else None.
    """

    unique: int
    opcode: int
    node: int
    place: int
    head: memoryview
    data: memoryview | None
    count: int
    done: int | None


class KeptRequests:
    """Requests in `region`, of `region_bytes`. `keeps`: the kernel does not hand them out again. `swap_inode` is the image's."""

    def __init__(self, region: Region, keeps: bool, swap_inode: int) -> None:
        # constant after construction
        self.region = region
        self.reply = region.view[_REPLY_AT : _REPLY_AT + wire.REPLY_BYTES + PAGE_BYTES]
        self.keeps = keeps
        self._swap_inode = swap_inode
        self._done = region.view[:_REPLY_AT].cast("Q")
        self._buffers = BUFFERS if keeps else 1
        self._entries_at = _BUFFERS_AT + self._buffers * _BUFFER_BYTES
        # guarded by the condition's lock
        self._freed = threading.Condition()
        self._place_of: dict[int, int] = {}
        self._free_buffers = list(range(self._buffers))
        self._free_entries = list(range(self._buffers, self._buffers + ENTRIES))
        #: The buffer that the next request is read to; None: all are taken.
        self._current: int | None = None
        if keeps:
            self._adopt()

    @staticmethod
    def region_bytes(keeps: bool) -> int:
        """Size of the region."""
        return _BUFFERS_AT + (BUFFERS * _BUFFER_BYTES + ENTRIES * ENTRY_BYTES if keeps else _BUFFER_BYTES)

    # ---- the leader ------------------------------------------------------------------------------------------------

    def buffer(self) -> tuple[memoryview, memoryview]:
        """Where the next request is read to: its head and its data. Waits for a free one, which only a program can cause."""
        with self._freed:
            if self._current is None:
                self._freed.wait_for(lambda: self._free_buffers)
                self._current = self._free_buffers.pop()
            return self._head(self._current), self._data(self._current)

    def keep_store(self, unique: int) -> None:
        """The WRITE to the image in the current buffer is answered later: it stays there, and the next one is read elsewhere."""
        if not self.keeps:
            return
        with self._freed:
            if unique in self._place_of or self._current is None:
                return
            if self._free_buffers:
                self._place_of[unique], self._current = self._current, self._free_buffers.pop()
                return
            head, data = self._head(self._current), self._data(self._current)
        self.keep(unique, head, data, wire.HEADER.unpack_from(head)[0])  # perhaps without its data: their buffer is needed
        self.forget_current()

    def keep(self, unique: int, head: memoryview, data: memoryview, count: int, spares: int = 0) -> None:
        """Another request, of `count` bytes, is answered later: copy it, or only its head if it is too large.

        The last `spares` free entries are not for it.
        """
        if not self.keeps:
            return
        with self._freed:
            if unique in self._place_of or len(self._free_entries) <= spares:
                return
            place = self._place_of[unique] = self._free_entries.pop()
        self._copy(place, head, data, count)

    def forget_current(self) -> None:
        """What the current buffer holds is answered or kept elsewhere. To be called before the next request is read to it."""
        if self.keeps and self._current is not None:
            wire.clear_unique(self._head(self._current))

    # ---- replies ---------------------------------------------------------------------------------------------------

    def answering(self, unique: int, number: int) -> None:
        """Request `unique` is done; what is left is its reply, with errno `number`."""
        if self.keeps and (place := self._place_with(unique)) is not None:
            # The errno first: the `unique` says that both are there.
            self._done[2 * place + 1] = number
            self._done[2 * place] = unique

    def answered(self, unique: int) -> None:
        """The reply to `unique` was sent: its place is free."""
        if not self.keeps:
            return
        with self._freed:
            place = self._place_of.pop(unique, None)
            if place is None:
                return
            if place < self._buffers:
                wire.clear_unique(self._head(place))
                self._free_buffers.append(place)
                self._freed.notify()
            else:
                wire.clear_unique(self._entry(place))
                self._free_entries.append(place)

    def _place_with(self, unique: int) -> int | None:
        place = self._place_of.get(unique)
        if place is None and self._current is not None and self._at(self._current).unique == unique:
            # Another request than the leader's has no place at all, and must not have its mark where that of the leader's belongs.
            place = self._current
        return place

    # ---- the next worker -------------------------------------------------------------------------------------------

    def left_over(self) -> deque[LeftOver]:
        """What an earlier worker left, in the order in which the kernel numbered it."""
        places = sorted(self._place_of.items())
        return deque(self._at(place) for _, place in places)

    def _adopt(self) -> None:
        """Find what is left over; move everything but WRITEs to the image out of the buffers."""
        for place in (*self._free_buffers, *self._free_entries):
            # The entry counts for a request that is in both: it is whole (wire.copy_request), and says whether the request is done.
            if unique := self._at(place).unique:
                self._place_of[unique] = place
        taken = set(self._place_of.values())
        for place in (*self._free_buffers, *self._free_entries):
            if place not in taken:
                # The other copy of a request that is in both, or it would be served again once the entry is answered and free.
                wire.clear_unique(self._at(place).head)
        self._free_entries = [place for place in self._free_entries if place not in taken]
        self._free_buffers = [place for place in self._free_buffers if place not in taken]
        for place in range(self._buffers):
            if place in taken:
                self._move_to_entry(self._at(place))
        if self._free_buffers:
            self._current = self._free_buffers.pop()

    def _move_to_entry(self, request: LeftOver) -> None:
        if self._is_store(request) or not self._free_entries or request.data is None:
            return
        entry = self._free_entries.pop()
        # The mark first: from the moment at which the request is in the entry, the entry counts.
        self._done[2 * entry : 2 * entry + 2] = self._done[2 * request.place : 2 * request.place + 2]
        self._copy(entry, request.head, request.data, request.count)
        self._place_of[request.unique] = entry
        wire.clear_unique(request.head)
        self._free_buffers.append(request.place)

    def _is_store(self, request: LeftOver) -> bool:
        return request.opcode == wire.WRITE and request.node == self._swap_inode

    def _at(self, place: int) -> LeftOver:
        if place < self._buffers:
            head, data = self._head(place), self._data(place)
        else:
            entry = self._entry(place)
            head, data = entry[: wire.IO_BYTES], entry[wire.IO_BYTES :]
        count, opcode, unique, node = wire.HEADER.unpack_from(head)
        is_done = self._done[2 * place] == unique
        done = self._done[2 * place + 1] if is_done else None
        return LeftOver(unique, opcode, node, place, head, data if count <= wire.IO_BYTES + len(data) else None, count, done)

    def _copy(self, place: int, head: memoryview, data: memoryview, count: int) -> None:
        """Copy a request to the entry `place`."""
        size = count - wire.IO_BYTES
        wire.copy_request(self._entry(place), head, data[: max(size, 0)] if count <= ENTRY_BYTES else data[:0])

    def _head(self, place: int) -> memoryview:
        at = _BUFFERS_AT + place * _BUFFER_BYTES
        return self.region.view[at : at + wire.IO_BYTES]

    def _data(self, place: int) -> memoryview:
        at = _BUFFERS_AT + place * _BUFFER_BYTES + PAGE_BYTES
        return self.region.view[at : at + _DATA_BYTES]

    def _entry(self, place: int) -> memoryview:
        at = self._entries_at + (place - self._buffers) * ENTRY_BYTES
        return self.region.view[at : at + ENTRY_BYTES]
