"""The link to the namespace: requests that are not for pages go to pyfuse3 and its replies come back, both untouched.

    leader --forward--> Forwards (forwards.py) --thread `forwards`--> socket --> pyfuse3 under trio
                                               <--thread `replies`--- socket <--

pyfuse3 is given one end of a SEQPACKET pair as /dev/fd/N and never sees a page. It holds the interpreter's lock while it receives,
so it must not splice: splicing allocates pages, and reclaim may be waiting for us (wire.decline_splice). INTERRUPT of a write to a
control file ends that write (interrupts.py); any other INTERRUPT is dropped: a request that waits for a free frame or for a disk is
finished.

Thread-safety: `forward` from the leader, `send_forwards` and `return_replies` from one thread each, `fail_forwarded` from any.

Invariant: 1. No exception ends one of the two threads: without them pyfuse3 would be asked no more, or would wait in a reply with
the interpreter's lock held.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from tmemfs.fuse import wire
from tmemfs.fuse.bugs import Bugs
from tmemfs.fuse.forwards import Forwards
from tmemfs.fuse.interrupts import Interrupts
from tmemfs.fuse.replies import PAUSE_S, Replies
from tmemfs.units import PAGE_BYTES

_SOCKET_BYTES: Final = 4 << 20
#: sockopts that exceed the limit of net.core.{w,r}mem_max, for root.
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
#: One end of the socket pair is closed.
_CLOSED: Final = frozenset((errno.EBADF, errno.ENOTCONN, errno.ECONNRESET))


class NamespaceLink:
    """Passes requests to pyfuse3, which is given `fd` and closes it, and its replies to `replies`.

    `interrupts` is told of the writes that are passed on; `page_requests` counts the requests of the page path. `init` is the
    kernel's first request, which the supervisor has read.
    """

    def __init__(self, replies: Replies, interrupts: Interrupts, page_requests: Callable[[], int], bugs: Bugs, init: bytes) -> None:
        self._init = init
        self._replies = replies
        self._interrupts = interrupts
        self._bugs = bugs
        self._ours, theirs = _socket_pair()
        self.fd = theirs.detach()
        self._forwards = Forwards(page_requests)
        # Requests that pyfuse3 has and has not answered: added by the thread `forwards`, removed by the thread `replies`.
        self._unanswered: set[int] = set()
        self._is_initialised = False
        #: Set once pyfuse3 has answered INIT, and at the end.
        self.answers = threading.Event()

    def forward(self, head: memoryview, data: memoryview, count: int, opcode: int) -> None:
        """Have a request of `count` bytes, which is copied, sent to pyfuse3, untouched except for INIT. Never raises."""
        try:
            if opcode in wire.RELEASES:
                # Until it is answered it takes one of the REQUESTS_UNDER_WAY from the loop device, and nobody waits for more.
                self._replies.send(wire.empty_reply(wire.HEADER.unpack_from(head)[2]))
            elif opcode == wire.WRITE:
                self._interrupts.began(*wire.WRITTEN_TO.unpack_from(head))
            # A queue and not the socket: a message takes memory of the kernel's, for which the leader must not wait.
            first = min(count, wire.IO_BYTES)
            self._forwards.put(bytes(head[:first]) + bytes(data[: count - first]))
        except Exception as error:  # MemoryError, for one
            unique = wire.HEADER.unpack_from(head)[2]
            self._interrupts.ended(unique)
            self._replies.fail(unique, error)

    def send_forwards(self) -> None:
        """Send pyfuse3 its requests, INIT first, until `end`."""
        is_over = False
        self._send_init()
        while not is_over:
            try:
                request = self._forwards.get()
                is_over = request is None
                if request is not None:
                    self._send(request)
            except Exception as error:
                self._bugs.note(error)
                time.sleep(PAUSE_S)

    def _send_init(self) -> None:
        """Introduce the kernel to pyfuse3. A kernel that has had the answer, from an earlier worker, refuses the second one."""
        init = bytearray(self._init)
        wire.decline_splice(memoryview(init))
        self._send(bytes(init))

    def _send(self, request: bytes) -> None:
        _, opcode, unique, *_ = wire.HEADER.unpack_from(request)
        if opcode == wire.INTERRUPT:
            self._interrupts.interrupt(*wire.INTERRUPTED.unpack_from(request))
            return
        if opcode not in wire.NO_REPLY:
            self._unanswered.add(unique)  # before it is sent: the reply may come at once
        try:
            self._ours.send(request)
        except OSError:  # pyfuse3 has ended; the pages are served all the same
            self._unanswered.discard(unique)
            self._interrupts.ended(unique)
            self._replies.send(wire.error_reply(unique, errno.ENOTCONN))

    def return_replies(self) -> None:
        """Copy pyfuse3's replies to the device, until the socket is closed."""
        buffer = bytearray(wire.REQUEST_BYTES + PAGE_BYTES)
        while True:
            try:
                count = self._ours.recv_into(buffer)
                if not count:
                    return
                self._return_reply(buffer[:count])
            except Exception as error:
                if isinstance(error, OSError) and error.errno in _CLOSED:
                    return
                self._bugs.note(error)
                time.sleep(PAUSE_S)

    def _return_reply(self, message: bytearray) -> None:
        """Copy a reply to the device, with our limits in the first one, which answers INIT."""
        if not self._is_initialised:
            wire.limit_requests(message)
            self._is_initialised = True
        unique = wire.REPLY.unpack_from(message)[2]
        if unique and unique not in self._unanswered:
            return  # it was answered with an error meanwhile (`fail_forwarded`)
        self._unanswered.discard(unique)
        self._interrupts.ended(unique)  # first: the kernel may use a number again once it is answered
        self._replies.send(message)
        if not self.answers.is_set():
            self.answers.set()

    def fail_forwarded(self) -> None:
        """pyfuse3 has dropped its requests: answer them with an error, or the processes that asked would wait for ever."""
        for unique in list(self._unanswered):
            self._unanswered.discard(unique)
            self._interrupts.ended(unique)
            self._replies.send(wire.error_reply(unique, errno.EIO))

    def end(self) -> None:
        """Have `send_forwards` return; what waits there is dropped."""
        self._forwards.put(None)
        self.answers.set()

    def close(self) -> None:
        """Close our end of the socket; pyfuse3 has ended and closed its own by then."""
        self._ours.close()


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        for force, plain in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
            try:
                end.setsockopt(socket.SOL_SOCKET, force, _SOCKET_BYTES)
            except PermissionError:
                end.setsockopt(socket.SOL_SOCKET, plain, _SOCKET_BYTES)
    return pair
