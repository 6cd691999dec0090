"""The page path: requests of the swap image, each followed from here to its reply.

    lead                  the leader reads a request; one that is not of the image is passed on (namespace_link.py)
      a page in RAM       Pager.load_page, which is Tmem.load itself -> reply; written out in `lead`
      a page on a tier    LeaderFollowers.do -> _load: Pager.read_page, which is Reader.load itself (it verifies and decodes in
                          Reader._decoded) -> reply
      other READs         _read: Pager.read -> reply, or LeaderFollowers.do -> _finish -> reply
      WRITE               _write: Pager.write -> reply, or, if it has to wait, thread `stores` -> _finish -> reply
      FALLOCATE           _discard: Pager.discard -> reply, or one of the ways of READ and WRITE

A page found in RAM is sent from a pre-faulted buffer of the leader. Every reply is one write(2), so any thread may send one.

Thread-safety: `lead` from the leader alone, whichever thread that is (leader_followers.py); `finish_stores` from one thread.

Invariants:
1. Each request is answered exactly once, by the thread that holds its `unique`.
2. The leader never waits for a free frame. It waits for a tier no longer than twice WATCH_PERIOD_S (leader_followers.py). It waits
   for the store's lock no longer than a request of another thread holds it: REQUEST_PAGES stores, or DISCARD_SLOTS slots forgotten.
   It does not send to a socket, because a message takes memory of the kernel's.
3. The request buffers belong to the leader. Work that may block borrows nothing of them.
4. What LeaderFollowers.do is given does not raise: after an error nobody knows which thread is the leader.
"""

from __future__ import annotations

import errno
import os
import queue
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from tmemfs.fuse import wire
from tmemfs.fuse.bugs import Bugs
from tmemfs.fuse.leader_followers import LeaderFollowers, Work
from tmemfs.fuse.namespace_link import NamespaceLink
from tmemfs.fuse.replies import GONE, PAUSE_S, Replies
from tmemfs.pages.pager import Deferred, Pager
from tmemfs.store.region import Region
from tmemfs.units import PAGE_BYTES

#: Loads from a tier that are under way at once.
READERS: Final = 4
_REPLY_AT: Final = PAGE_BYTES
_DATA_AT: Final = 3 * PAGE_BYTES
_SERVED: Final = frozenset((wire.READ, wire.WRITE, wire.FALLOCATE))
#: ENOENT: the request was interrupted while it was read; libfuse takes it so, too.
_TRY_AGAIN: Final = frozenset((errno.EINTR, errno.EAGAIN, errno.ENOENT))


@dataclass(slots=True)
class PageCounts:
    """Since the start; written by the leader alone. `deferred` of the `requests` could not be answered at once."""

    requests: int = 0
    deferred: int = 0


class PagePath:
    """Serves the requests of inode `swap_inode` on the FUSE device `device_fd` from `pager`; passes others on to `namespace`."""

    def __init__(
        self,
        device_fd: int,
        pager: Pager,
        swap_inode: int,
        namespace: NamespaceLink,
        replies: Replies,
        counts: PageCounts,
        bugs: Bugs,
    ) -> None:
        # constant after construction
        self._device = device_fd
        self._pager = pager
        self._swap_inode = swap_inode
        self._namespace = namespace
        self._replies = replies
        self._bugs = bugs
        #: Head and data of the request, and the reply of a page from RAM. To be locked in RAM.
        self.buffers = Region("requests", _DATA_AT + wire.REQUEST_BYTES + PAGE_BYTES)
        self._arrivals = select.poll()
        self._arrivals.register(device_fd, select.POLLIN)
        self.followers = LeaderFollowers(READERS + 1, self._has_requests)
        self._stores: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        # the leader's; a lock hands the role over, so the next leader sees them
        self._counts = counts

    def lead(self) -> bool:
        """Answer requests, until the file system is unmounted (True) or this thread is not the leader any more (False).

        A load of one page from RAM is written out here: through `_serve`, `_read`, Pager.read and Replies.send it takes 21 us of
        CPU instead of 15, two system calls included (median of interleaved runs, fed as by tools/bench/anatomy.py).
        """
        # Local names are looked up once per leader, and not once per page.
        device, inode, counts = self._device, self._swap_inode, self._counts
        readv, write, unpack = os.readv, os.write, wire.IO.unpack_from
        load_page, pack_reply, load = self._pager.load_page, wire.REPLY.pack_into, self._load
        head = self.buffers.view[: wire.IO_BYTES]
        data = self.buffers.view[_DATA_AT : _DATA_AT + wire.REQUEST_BYTES + PAGE_BYTES]
        into = [head, data]
        reply = self.buffers.view[_REPLY_AT : _REPLY_AT + wire.REPLY_BYTES + PAGE_BYTES]
        page_at, page_mask = wire.REPLY_BYTES, PAGE_BYTES - 1
        page_reply_bytes = len(reply)
        read_opcode, swap_bytes = wire.READ, self._pager.swap_bytes
        unique = 0
        while True:
            try:
                count = readv(device, into)
            except OSError as error:
                if error.errno in _TRY_AGAIN:
                    continue  # without a pause: that is no failure
                if error.errno in GONE:
                    return True
                self._bugs.note(error)
                time.sleep(PAUSE_S)
                continue
            try:
                _, opcode, unique, node, offset, size = unpack(head)
                if node != inode:
                    self._namespace.forward(head, data, count, opcode)
                    continue
                if opcode == read_opcode and size == PAGE_BYTES and not offset & page_mask and offset < swap_bytes:
                    counts.requests += 1
                    page = load_page(offset >> 12)
                    if page is not None:
                        pack_reply(reply, 0, page_reply_bytes, 0, unique)
                        reply[page_at:] = page
                        try:
                            write(device, reply)
                        except OSError as error:
                            self._replies.note_refusal(error)
                        continue
                    # The tier is asked by `_load` alone, after LeaderFollowers has seen to it that this thread may block.
                    counts.deferred += 1
                    work: Work | None = partial(load, unique, offset >> 12)
                else:
                    work = self._serve(opcode, head, data, count)
            except Exception as error:
                self._replies.fail(unique, error)
                continue
            # Outside of the `try`: from here on this thread may not be the leader any more, and must not read on.
            if work is not None and not self.followers.do(work, is_long=opcode == wire.FALLOCATE):
                return False

    def _load(self, unique: int, slot: int) -> None:
        """Reply with a page that a tier holds, or held a moment ago. Never raises."""
        try:
            # It finds the page again: a store or a discard may have come since the leader looked. They are concurrent with this
            # load, which is not answered yet, so the old page and the new one are both right.
            page = self._pager.read_page(slot)
            self._replies.send(wire.REPLY.pack(wire.REPLY_BYTES + PAGE_BYTES, 0, unique), page)
        except Exception as error:
            self._replies.fail(unique, error)

    def _serve(self, opcode: int, head: memoryview, data: memoryview, count: int) -> Work | None:
        """Answer a request of the image, or queue it; gives the work that is left for LeaderFollowers, if any."""
        if opcode not in _SERVED:
            self._namespace.forward(head, data, count, opcode)
            return None
        self._counts.requests += 1
        if opcode == wire.READ:
            return self._read(head)
        if opcode == wire.FALLOCATE:
            return self._discard(head)
        self._write(head, data[: count - wire.IO_BYTES])
        return None

    def _read(self, head: memoryview) -> Work | None:
        """READ of any size, for example of a cluster that swap reads ahead."""
        _, _, unique, _, offset, size = wire.IO.unpack_from(head)
        found = self._pager.read(offset, size)
        if isinstance(found, Deferred):
            return self._defer(unique, found)
        self._answer(unique, found)
        return None

    def _write(self, head: memoryview, data: memoryview) -> None:
        """WRITE: swap-out. `data` is borrowed."""
        _, _, unique, _, offset, size = wire.IO.unpack_from(head)
        rest = self._pager.write(offset, data)
        if rest is not None:
            self._defer(unique, rest, size)
        else:
            self._answer(unique, None, size)

    def _discard(self, head: memoryview) -> Work | None:
        """FALLOCATE: what a discard of the loop device becomes."""
        _, _, unique, _, offset, length, mode = wire.FALLOCATION.unpack_from(head)
        if mode not in (wire.PUNCH_HOLE, wire.ZERO_RANGE):
            self._replies.send(wire.error_reply(unique, errno.EOPNOTSUPP))
            return None
        rest = self._pager.discard(offset, length)
        if rest is not None:
            return self._defer(unique, rest)
        self._answer(unique, None)
        return None

    def _defer(self, unique: int, rest: Deferred, written_bytes: int = 0) -> Work | None:
        """Queue the rest of a request for the thread `stores`, or give it back as work for LeaderFollowers."""
        self._counts.deferred += 1
        # It holds what it needs (invariant 3): the next request overwrites the buffers.
        work = partial(self._finish, unique, rest.run, written_bytes)
        if rest.kind != "store":
            return work
        self._stores.put(work)  # one queue and one thread, so that stores keep their order
        return None

    def _finish(self, unique: int, run: Callable[[], bytes | None], written_bytes: int) -> None:
        """Do what was deferred, and answer. Never raises."""
        try:
            self._answer(unique, run(), written_bytes)
        except Exception as error:
            self._replies.fail(unique, error)

    def _answer(self, unique: int, result: bytes | None, written_bytes: int = 0) -> None:
        """Reply with what was read, with the number of bytes written, or, if there is neither, with nothing."""
        if result is not None:
            self._replies.send(wire.REPLY.pack(wire.REPLY_BYTES + len(result), 0, unique), result)
        else:
            self._replies.send(wire.written_reply(unique, written_bytes) if written_bytes else wire.empty_reply(unique))

    def _has_requests(self) -> bool:
        """Whether requests wait; without an answer, no."""
        try:
            return bool(self._arrivals.poll(0))
        except Exception:  # LeaderFollowers.do must not raise
            return False

    def finish_stores(self) -> None:
        """Finish the stores that wait for free frames, in order of arrival, until `end`."""
        while work := self._stores.get():
            work()

    def end(self) -> None:
        """Have `finish_stores` return once the stores that wait are finished."""
        self._stores.put(None)
