"""The relay: answers the swap image's pages itself and hands everything else to pyfuse3.

    kernel <-> /dev/fuse <-> the leader --(READ, WRITE, FALLOCATE of the image)--> pager
                                |  |`-- loads from a tier (leader_followers.py), answers --> /dev/fuse
                                |  `--- stores that wait --> store thread --> /dev/fuse
                                `------ all other requests --> forwards thread --> socket --> pyfuse3 under trio
                                                                                   socket --> replies thread --> /dev/fuse

pyfuse3 is given one end of a SEQPACKET pair as /dev/fd/N and never sees a page. It holds the interpreter's lock while it receives,
so it must not splice: the pages for that may have to wait for us (wire.decline_splice). A reply goes out with one write(2), from a
buffer that is faulted in for a page from RAM, so any thread may answer. INTERRUPT of a write to a control file ends it
(interrupts.py); any other is dropped: a request that waits for room or for a disk is finished, not taken back.

Thread-safety: `start`, `join`, `close` and `statistics` from any one thread. Everything else is constant after construction
or belongs to one thread.

Invariants:
1. Each request is answered exactly once, by whoever holds its `unique`.
2. Who leads never waits for room in the pool, for a tier no longer than twice PATIENCE_S (leader_followers.py), and for the lock no
   longer than a request of another thread holds it: REQUEST_PAGES stores, or DISCARD_SLOTS slots forgotten. Nor does it send: a
   socket's message takes memory of the kernel's.
3. The request buffers are the leader's alone; work that may block borrows nothing of them.
4. No exception ends one of its threads: a request that failed is answered with an error, and the next one is read. Only an
   unmounted or aborted connection ends them. What `LeaderFollowers.work` calls must not raise:
   after an error nobody knows which thread leads.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import select
import socket
import threading
import time
import traceback
from collections.abc import Callable
from typing import Final

import trio

from tmemfs.errors import TmemfsError
from tmemfs.fuse import wire
from tmemfs.fuse.errnos import errno_of
from tmemfs.fuse.forwards import Forwards
from tmemfs.fuse.interrupts import Interrupts
from tmemfs.fuse.leader_followers import LeaderFollowers
from tmemfs.pages.pager import Deferred, Pager
from tmemfs.store.region import Region
from tmemfs.system.memory import prepare_thread
from tmemfs.units import PAGE_BYTES

log = logging.getLogger(__name__)

#: Loads from a tier that are under way at once.
READERS: Final = 4
_SOCKET_BYTES: Final = 4 << 20
_REPLY_AT: Final = PAGE_BYTES
_DATA_AT: Final = 3 * PAGE_BYTES
_GONE: Final = frozenset((errno.ENODEV, errno.EBADF, errno.ENOTCONN, errno.ECONNABORTED))
_PAGES: Final = frozenset((wire.READ, wire.WRITE, wire.FALLOCATE))
_TRY_AGAIN: Final = frozenset((errno.EINTR, errno.EAGAIN, errno.ENOENT))
#: After a failure that does not concern one request, so that one that lasts does not take a core.
_PAUSE_S: Final = 0.01
#: To answer with an error.
_TRIES: Final = 100
#: One end of the socket pair is closed.
_CLOSED: Final = frozenset((errno.EBADF, errno.ENOTCONN, errno.ECONNRESET))
#: Requests that want no reply, or were given one before pyfuse3 has them.
_NO_REPLY: Final = wire.RELEASES | {wire.FORGET, wire.BATCH_FORGET}
#: sockopts that go past the limit of net.core.{w,r}mem_max, for root.
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33

Work = tuple[int, Deferred, int]


class Relay:
    """Serves `pager` on the FUSE device `device_fd`; `swap_inode` is the image's.

    `namespace_fd` is for pyfuse3, which closes it; `interrupts` is told of the writes that go there.
    """

    def __init__(self, device_fd: int, pager: Pager, swap_inode: int, interrupts: Interrupts | None = None) -> None:
        self._interrupts = interrupts or Interrupts()
        self._device = device_fd
        self._pager = pager
        self._swap_inode = swap_inode
        # the leader's; the lead is handed on by a lock, so that the next leader has seen them
        self.requests = self.deferred = 0
        self._ours, theirs = _socket_pair()
        self.namespace_fd = theirs.detach()
        self.buffers = Region("requests", _DATA_AT + wire.REQUEST_BYTES + PAGE_BYTES)
        self._asked = select.poll()
        self._asked.register(device_fd, select.POLLIN)
        self._followers: LeaderFollowers[Work] = LeaderFollowers(READERS + 1, self._finish, self._is_asked)
        self._stores: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._forwards = Forwards(lambda: self.requests)
        self._ended = os.eventfd(0, os.EFD_CLOEXEC)
        self._is_over = self._is_initialised = False
        self._bugs: set[str] = set()
        # requests that pyfuse3 has and has not answered; added to by `forwards`, taken from by `replies`
        self._with_namespace: set[int] = set()
        self._threads = [
            threading.Thread(target=self._return_replies, name="replies", daemon=True),
            threading.Thread(target=self._send_forwards, name="forwards", daemon=True),
            threading.Thread(target=self._store, name="stores", daemon=True),
            threading.Thread(target=self._watch_turns, name="watch", daemon=True),
            *(threading.Thread(target=self._take_turns, name=f"page-path-{n}", daemon=True) for n in range(READERS + 1)),
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    async def wait_ended(self) -> None:
        """Return once the file system is unmounted."""
        await trio.lowlevel.wait_readable(self._ended)

    def join(self, timeout_s: float = 5.0) -> None:
        """Wait for the threads that could be started; they end when the file system is unmounted."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(timeout_s)

    def close(self) -> None:
        """Let go of what was opened; pyfuse3 has ended and closed its end of the socket by then."""
        self._ours.close()
        os.close(self._ended)

    @property
    def is_over(self) -> bool:
        """Whether the file system is unmounted."""
        return self._is_over

    def fail_forwarded(self) -> None:
        """pyfuse3 has dropped what it was at: answer that with an error, or those who asked would wait for ever."""
        for unique in list(self._with_namespace):
            self._with_namespace.discard(unique)
            self._interrupts.ended(unique)
            self._reply(wire.error_reply(unique, errno.EIO))

    def statistics(self) -> dict[str, int]:
        """Requests on the page path and how many of them were deferred, since the start."""
        return {"requests": self.requests, "deferred": self.deferred}

    def _take_turns(self) -> None:
        """The page path, until the file system is unmounted."""
        self._prepare_for_pages()
        self._followers.take(self._lead)

    def _watch_turns(self) -> None:
        """See that nobody keeps the lead for long."""
        self._guard(prepare_thread)
        self._followers.watch()

    def _prepare_for_pages(self) -> None:
        """Have the calling thread touch what it will touch; one that could not serves all the same."""
        self._guard(prepare_thread)
        self._guard(self._pager.warm_thread)

    def _is_asked(self) -> bool:
        """Whether requests wait; without an answer, no."""
        try:
            return bool(self._asked.poll(0))
        except Exception:
            return False

    def _lead(self) -> bool:
        """Serve requests; whether it is over: the file system is unmounted."""
        is_over = True
        try:
            is_over = self._serve_requests()
        finally:
            if is_over:
                self._is_over = True
                os.eventfd_write(self._ended, 1)
                self._stores.put(None)
                self._forwards.put(None)
        return is_over

    def _serve_requests(self) -> bool:
        """Answer what can be answered at once, pages in RAM right here. Ends with the lead (False), or when it is over."""
        device, inode = self._device, self._swap_inode
        readv, write, unpack = os.readv, os.write, wire.IO.unpack_from
        load_page, read_page, pack_reply = self._pager.load_page, self._pager.read_page, wire.REPLY.pack_into
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
                    continue
                if error.errno in _GONE:
                    return True
                self._log_bug(error)
                time.sleep(_PAUSE_S)
                continue
            try:
                _, opcode, unique, node, offset, size = unpack(head)
                if node != inode:
                    self._forward(head, data, count, opcode)
                    continue
                if opcode == read_opcode and size == PAGE_BYTES and not offset & page_mask and offset < swap_bytes:
                    self.requests += 1
                    page = load_page(offset >> 12)
                    if page is not None:
                        pack_reply(reply, 0, page_reply_bytes, 0, unique)
                        reply[page_at:] = page
                        try:
                            write(device, reply)
                        except OSError as error:
                            self._not_taken(error)
                        continue
                    work = self._have_done(unique, read_page(offset >> 12), size)
                else:
                    work = self._serve(opcode, head, data, count)
            except Exception as error:
                self._fail(unique, error)
                continue
            if work is not None and not self._followers.work(work, work[1].lane == "long"):
                return False

    def _serve(self, opcode: int, head: memoryview, data: memoryview, count: int) -> Work | None:
        """Answer one request of the image, or have it answered; gives it back if that is work of those who take turns."""
        if opcode not in _PAGES:
            self._forward(head, data, count, opcode)
            return None
        self.requests += 1
        _, _, unique, _, offset, size = wire.IO.unpack_from(head)
        result: bytes | Deferred | None
        if opcode == wire.READ:
            result = self._pager.read(offset, size)
        elif opcode == wire.WRITE:
            result = self._pager.write(offset, data[: count - wire.IO_BYTES])
        else:
            _, _, _, _, offset, length, mode = wire.FALLOCATION.unpack_from(head)
            if mode not in (wire.PUNCH_HOLE, wire.ZERO_RANGE):
                self._reply(wire.error_reply(unique, errno.EOPNOTSUPP))
                return None
            result, size = self._pager.discard(offset, length), 0
        return self._have_done(unique, result, size)

    def _have_done(self, unique: int, result: bytes | Deferred | None, size: int) -> Work | None:
        """Answer with `result`, or see that what is left of it is done; gives it back if that is work of those who take turns."""
        if not isinstance(result, Deferred):
            self._answer(unique, result, size)
            return None
        self.deferred += 1
        if result.lane != "store":
            return unique, result, size
        self._stores.put((unique, result, size))
        return None

    def _answer(self, unique: int, result: bytes | None, size: int) -> None:
        """Reply with what was read, or that `size` bytes were written, or, where that is 0, with nothing."""
        if result is None:
            self._reply(wire.written_reply(unique, size) if size else wire.empty_reply(unique))
        else:
            self._reply(wire.REPLY.pack(wire.REPLY_BYTES + len(result), 0, unique), result)

    def _forward(self, head: memoryview, data: memoryview, count: int, opcode: int) -> None:
        """Hand a request to pyfuse3, untouched but for INIT."""
        try:
            if opcode == wire.INIT:
                wire.decline_splice(head)
            if opcode in wire.RELEASES:
                # Until it is answered it takes one of the REQUESTS_UNDER_WAY from the loop device, and nobody waits for more.
                self._reply(wire.empty_reply(wire.HEADER.unpack_from(head)[2]))
            elif opcode == wire.WRITE:
                self._interrupts.began(*wire.WRITTEN_TO.unpack_from(head))
            first = min(count, wire.IO_BYTES)
            self._forwards.put(bytes(head[:first]) + bytes(data[: count - first]))
        except Exception as error:  # MemoryError, for one
            unique = wire.HEADER.unpack_from(head)[2]
            self._interrupts.ended(unique)
            self._fail(unique, error)

    def _send_forwards(self) -> None:
        """Send pyfuse3 its requests, until told to end."""
        self._guard(prepare_thread)
        is_over = False
        while not is_over:
            try:
                is_over = self._send_next()
            except Exception as error:
                self._log_bug(error)
                time.sleep(_PAUSE_S)

    def _send_next(self) -> bool:
        """Send one request; whether it was the end."""
        request = self._forwards.get()
        if request is not None:
            self._send_forward(request)
        return request is None

    def _send_forward(self, request: bytes) -> None:
        _, opcode, unique, *_ = wire.HEADER.unpack_from(request)
        if opcode == wire.INTERRUPT:
            self._interrupts.interrupt(*wire.INTERRUPTED.unpack_from(request))
            return
        if opcode not in _NO_REPLY:
            self._with_namespace.add(unique)
        try:
            self._ours.send(request)
        except OSError:  # pyfuse3 has gone; the pages are served all the same
            self._with_namespace.discard(unique)
            self._interrupts.ended(unique)
            self._reply(wire.error_reply(unique, errno.ENOTCONN))

    def _guard(self, step: Callable[[], object]) -> None:
        """Do one step of a thread; what it raises is a bug, and ends the step alone."""
        try:
            step()
        except Exception as error:
            self._log_bug(error)
            time.sleep(_PAUSE_S)

    def _store(self) -> None:
        """Finish deferred stores, until told to end."""
        self._prepare_for_pages()
        while work := self._stores.get():
            self._finish(work)

    def _finish(self, work: Work) -> None:
        """Do what was deferred, and answer; never raises."""
        unique, deferred, size = work
        try:
            self._answer(unique, deferred.run(), size)
        except Exception as error:
            self._fail(unique, error)

    def _return_replies(self) -> None:
        """Copy pyfuse3's replies to the device, with our limits in the first, which answers INIT."""
        self._guard(prepare_thread)
        buffer = bytearray(wire.REQUEST_BYTES + PAGE_BYTES)
        while True:
            try:
                count = self._ours.recv_into(buffer)
            except OSError as error:
                if error.errno in _CLOSED:
                    return
                # without this thread pyfuse3 would wait in a reply at last, with the interpreter's lock
                self._log_bug(error)
                time.sleep(_PAUSE_S)
                continue
            if not count:
                return
            self._guard(lambda count=count: self._return_reply(buffer[:count]))  # type: ignore[misc]

    def _return_reply(self, message: bytearray) -> None:
        if not self._is_initialised:
            wire.limit_requests(message)
            self._is_initialised = True
        unique = wire.REPLY.unpack_from(message)[2]
        if unique and unique not in self._with_namespace:
            return  # it was answered with an error meanwhile (`fail_forwarded`)
        self._with_namespace.discard(unique)
        self._interrupts.ended(unique)  # first: a number may come again once it is answered
        self._reply(message)

    def _reply(self, *parts: bytes | bytearray) -> None:
        """One reply, with one call. The kernel may have given the request up (ENOENT) or be gone."""
        try:
            os.writev(self._device, parts)
        except OSError as error:
            self._not_taken(error)

    def _not_taken(self, error: OSError) -> None:
        """A reply was not taken: the kernel gave the request up, or has gone, or we have a bug."""
        if error.errno not in _GONE and error.errno != errno.ENOENT:
            log.error("bug in tmemfs, please report it: a reply was not taken: %s", error)

    def _fail(self, unique: int, error: Exception) -> None:
        """Answer with an error; what is not one of ours is a bug. Never raises."""
        if isinstance(error, TmemfsError):
            number = errno_of(error)
        else:
            number = errno.EIO
            self._log_bug(error)
        for _ in range(_TRIES):  # who asked waits for ever without an answer, which takes a little memory
            try:
                self._reply(wire.error_reply(unique, number))
                return
            except Exception as another:
                self._log_bug(another)
                time.sleep(_PAUSE_S)

    def _log_bug(self, error: Exception) -> None:
        """Log a bug, once for each place; whatever becomes of that, the thread goes on."""
        try:
            where = repr(traceback.extract_tb(error.__traceback__)[-1:])
            if where not in self._bugs:
                self._bugs.add(where)
                log.error("bug in tmemfs, please report it", exc_info=error)
        except Exception:
            return


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        for force, plain in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
            try:
                end.setsockopt(socket.SOL_SOCKET, force, _SOCKET_BYTES)
            except PermissionError:
                end.setsockopt(socket.SOL_SOCKET, plain, _SOCKET_BYTES)
    return pair
