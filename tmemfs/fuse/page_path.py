"""The page path: requests of the swap image, each followed from here to its reply.

    lead                  the leader reads a request; one that is not of the image is passed on (namespace_link.py)
      a page in RAM       Pager.load_page, which is Tmem.load itself -> reply; written out in `lead`
      a page on a tier    LeaderFollowers.do -> _load: Pager.read_page, which is Reader.load itself (it verifies and decodes in
                          Reader._decoded) -> reply
      other READs         _read: Pager.read -> reply, or LeaderFollowers.do -> _finish -> reply
      WRITE               _write: Pager.write -> reply, or, if it has to wait, thread `stores` -> _finish -> reply
      FALLOCATE           _discard: Pager.discard -> reply, or one of the ways of READ and WRITE

A page found in RAM is sent from a pre-faulted buffer of the leader. Every reply is one write(2), so any thread may send one.

Before the leader reads its first request, it takes up what an earlier worker read and did not answer: it has the kernel hand that
out again, or finds it in the shared buffers (kept_requests.py). A request that workers died of is answered with an error then.

Thread-safety: `lead` from the leader alone, whichever thread that is (leader_followers.py); `finish_stores` from one thread.

Invariants:
1. Each request is answered exactly once, by the thread that holds its `unique`.
2. The leader never waits for a free frame. It waits for a tier no longer than twice WATCH_PERIOD_S (leader_followers.py). It waits
   for the store's lock no longer than a request of another thread holds it: REQUEST_PAGES stores, or DISCARD_SLOTS slots forgotten.
   It does not send to a socket, because a message takes memory of the kernel's.
3. The current request buffer belongs to the leader. Work that may block borrows nothing of it.
4. What LeaderFollowers.do is given does not raise: after an error nobody knows which thread is the leader.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import select
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from tmemfs.fuse import wire
from tmemfs.fuse.bugs import Bugs
from tmemfs.fuse.handling import IDLE, LEADER, Handling
from tmemfs.fuse.kept_requests import PAGE_ENTRIES, KeptRequests, LeftOver
from tmemfs.fuse.leader_followers import LeaderFollowers, Work
from tmemfs.fuse.namespace_link import NamespaceLink
from tmemfs.fuse.replies import GONE, PAUSE_S, Replies
from tmemfs.jobs.latency import Latency
from tmemfs.pages.pager import Deferred, Pager
from tmemfs.policy.bursts import STORE_WEIGHT
from tmemfs.store.region import Region
from tmemfs.units import PAGE_BYTES

log = logging.getLogger(__name__)

#: Loads from a tier that are under way at once.
READERS: Final = 4
_SERVED: Final = frozenset((wire.READ, wire.WRITE, wire.FALLOCATE))
#: What must not be done again after its answer.
_CHANGES: Final = frozenset((wire.WRITE, wire.FALLOCATE))
#: A request of which so many workers died is refused.
MOST_DEATHS: Final = 2
#: ENOENT: the request was interrupted while it was read; libfuse takes it so, too.
_TRY_AGAIN: Final = frozenset((errno.EINTR, errno.EAGAIN, errno.ENOENT))


@dataclass(slots=True)
class PageCounts:
    """Since the start; written by the leader alone. `deferred` of the `requests` could not be answered at once.

    `writes` are stores. `poisoned` were answered with an error, because workers had died of them.
    """

    requests: int = 0
    deferred: int = 0
    writes: int = 0
    poisoned: int = 0


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What a worker has of those before it: the buffers with requests in them, the words that say which thread handles which, and
    how many of them died of a request, by its `unique`. `is_first`: there was none."""

    kept: KeptRequests
    handling: Handling
    suspects: Mapping[int, int]
    is_first: bool

    @classmethod
    def none(cls, swap_inode: int) -> Inheritance:
        """That of a first worker, with buffers of its own, which nobody reads after it."""
        kept = KeptRequests(Region("requests", KeptRequests.region_bytes(keeps=False)), False, swap_inode)
        return cls(kept, Handling(), {}, True)


class PagePath:
    """Serves the requests of inode `swap_inode` on the FUSE device `device_fd` from `pager`; passes others on to `namespace`."""

    def __init__(
        self,
        device_fd: int,
        pager: Pager,
        swap_inode: int,
        inheritance: Inheritance,
        namespace: NamespaceLink,
        replies: Replies,
        counts: PageCounts,
        bugs: Bugs,
        latency: Latency,
    ) -> None:
        # constant after construction
        self._device = device_fd
        self._pager = pager
        self._swap_inode = swap_inode
        self._namespace = namespace
        self._replies = replies
        self._bugs = bugs
        self._latency = latency
        self._kept = inheritance.kept
        self._handling = inheritance.handling
        self._suspects = inheritance.suspects
        self._arrivals = select.poll()
        self._arrivals.register(device_fd, select.POLLIN)
        self.followers = LeaderFollowers(READERS + 1, self._has_requests)
        self._stores: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        # the leader's; a lock hands the role over, so the next leader sees them
        self._counts = counts
        self._is_to_resend = not inheritance.is_first and not self._kept.keeps
        self._left_over = self._kept.left_over()

    def lead(self) -> bool:
        """Answer requests, until the file system is unmounted (True) or this thread is not the leader any more (False).

        A load of one page from RAM is written out here: through `_serve`, `_read`, Pager.read and Replies.send it takes 21 us of
        CPU instead of 15, two system calls included (median of interleaved runs, fed as by tools/bench/anatomy.py).
        """
        if not self._take_up():
            return False
        # Local names are looked up once per leader, and not once per page.
        device, inode, counts, latency = self._device, self._swap_inode, self._counts, self._latency
        readv, write, unpack = os.readv, os.write, wire.IO.unpack_from
        load_page, pack_reply, load = self._pager.load_page, wire.REPLY.pack_into, self._load
        handling, resent = self._handling.words, wire.RESENT
        head, data = into = self._kept.buffer()
        reply = self._kept.reply
        page_at, page_mask = wire.REPLY_BYTES, PAGE_BYTES - 1
        page_reply_bytes = len(reply)
        read_opcode, swap_bytes = wire.READ, self._pager.swap_bytes
        unique, is_first = 0, True
        while True:
            handling[LEADER] = unique | IDLE
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
                handling[LEADER] = unique
                if unique >= resent and self._is_poison(unique, opcode):
                    continue
                if (
                    node == inode
                    and opcode == read_opcode
                    and size == PAGE_BYTES
                    and not offset & page_mask
                    and offset < swap_bytes
                ):
                    counts.requests += 1
                    if latency.is_armed:
                        latency.note()
                    page = load_page(offset >> 12)
                    if page is not None:
                        pack_reply(reply, 0, page_reply_bytes, 0, unique)
                        reply[page_at:] = page
                        try:
                            write(device, reply)
                        except OSError as error:
                            self._replies.note_refusal(error)
                        if is_first:
                            is_first = False
                            self._handling.note_answer()
                        continue
                    # The tier is asked by `_load` alone, after LeaderFollowers has seen to it that this thread may block.
                    counts.deferred += 1
                    self._kept.keep(unique, head, data, count)
                    work: Work | None = partial(load, unique, offset >> 12)
                else:
                    work = self._serve(opcode, head, data, count)
                    # A store that waits keeps its buffer.
                    head, data = into = self._kept.buffer()
            except Exception as error:
                self._replies.fail(unique, error)
                head, data = into = self._kept.buffer()
                continue
            # Outside of the `try`: from here on this thread may not be the leader any more, and must not read on.
            if work is not None and not self.followers.do(work, is_long=opcode == wire.FALLOCATE):
                return False

    def _take_up(self) -> bool:
        """Take up what an earlier worker did not answer; whether this thread is the leader still. Called by each new leader."""
        if self._is_to_resend:
            self._is_to_resend = False
            self._replies.send(wire.RESEND)
        while self._left_over:
            request = self._left_over.popleft()
            self._handling.words[LEADER] = request.unique
            try:
                work = self._serve_again(request)
            except Exception as error:
                self._replies.fail(request.unique, error)
                continue
            if work is not None and not self.followers.do(work, is_long=request.opcode == wire.FALLOCATE):
                return False
        return True

    def _serve_again(self, request: LeftOver) -> Work | None:
        """Serve a request that an earlier worker has read, or only send the reply that it did not come to."""
        if self._is_poison(request.unique, request.opcode):
            return None
        if request.done is not None and request.node == self._swap_inode and request.opcode in _CHANGES:
            size = wire.IO.unpack_from(request.head)[5] if request.opcode == wire.WRITE else 0
            self._replies.send(wire.done_reply(request.unique, request.done, size))
        elif request.data is None:
            self._replies.send(wire.error_reply(request.unique, errno.EIO))
        else:
            work = self._serve(request.opcode, request.head, request.data, request.count)
            if request.opcode in wire.NO_REPLY:
                self._kept.answered(request.unique)
            return work
        return None

    def _is_poison(self, unique: int, opcode: int) -> bool:
        """Whether workers died of request `unique`, MOST_DEATHS of them; it is answered with an error then."""
        if self._suspects.get(unique & ~wire.RESENT, 0) < MOST_DEATHS:
            return False
        self._counts.poisoned += 1
        log.critical("request %d (opcode %d) ended %d workers and is refused: please report it", unique, opcode, MOST_DEATHS)
        self._replies.send(wire.error_reply(unique, errno.EIO))
        return True

    def _load(self, unique: int, slot: int) -> None:
        """Reply with a page that a tier holds, or held a moment ago. Never raises."""
        self._handling.begin(unique)
        try:
            # It finds the page again: a store or a discard may have come since the leader looked. They are concurrent with this
            # load, which is not answered yet, so the old page and the new one are both right.
            page = self._pager.read_page(slot)
            self._replies.send(wire.REPLY.pack(wire.REPLY_BYTES + PAGE_BYTES, 0, unique), page)
        except Exception as error:
            self._replies.fail(unique, error)
        self._handling.end()

    def _serve(self, opcode: int, head: memoryview, data: memoryview, count: int) -> Work | None:
        """Answer a request, or pass it on, or queue it; gives the work that is left for LeaderFollowers, if any."""
        _, _, unique, node, *_ = wire.IO.unpack_from(head)
        if node != self._swap_inode or opcode not in _SERVED:
            if opcode not in wire.NO_REPLY:
                self._kept.keep(unique, head, data, count, PAGE_ENTRIES)
            self._namespace.forward(head, data, count, opcode)
            self._kept.forget_current()
            return None
        self._counts.requests += 1
        if opcode == wire.WRITE:
            self._counts.writes += 1
        if self._latency.is_armed:
            self._latency.note(STORE_WEIGHT if opcode == wire.WRITE else 1)
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
            self._kept.keep(unique, head, head[:0], wire.IO_BYTES)
            return self._defer(unique, found)
        self._answer(unique, found)
        return None

    def _write(self, head: memoryview, data: memoryview) -> None:
        """WRITE: swap-out. `data` is borrowed."""
        _, _, unique, _, offset, size = wire.IO.unpack_from(head)
        rest = self._pager.write(offset, data)
        if rest is not None:
            self._kept.keep_store(unique)
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
            self._kept.keep(unique, head, head[:0], wire.IO_BYTES)
            self._kept.forget_current()
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
        self._handling.begin(unique)
        try:
            self._answer(unique, run(), written_bytes)
        except Exception as error:
            self._replies.fail(unique, error)
        self._handling.end()

    def _answer(self, unique: int, result: bytes | None, written_bytes: int = 0) -> None:
        """Reply with what was read, with the number of bytes written, or, if there is neither, with nothing."""
        if result is not None:
            self._replies.send(wire.REPLY.pack(wire.REPLY_BYTES + len(result), 0, unique), result)
        else:
            self._replies.send(wire.written_reply(unique, written_bytes) if written_bytes else wire.empty_reply(unique))
        self._handling.note_answer()

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
