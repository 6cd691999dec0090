"""The requests that wait for pyfuse3: root's are passed on at once, those of other users at a limited rate, fair between users.

pyfuse3 and what it calls hold the interpreter's lock while they answer, and the page path needs that lock for each page. So all
users but root share a limit: one request per BUSY_GAP_S while there are requests for pages, one per IDLE_GAP_S while there are
none, and up to BURST_S worth of requests at once. A process that asks for more waits in the kernel, and takes no CPU meanwhile.
The users are served round-robin: one with a thousand processes delays another user no more than one with a single process does.

A RELEASE has the user id 0, whatever user closed the file. It was answered before it comes here (namespace_link.py), and nobody
waits for it. One RELEASE may follow each request, so they keep up with the opens, also with root's. The others are passed on when
no request waits, at the same rate: a process that closes thousands of files does not take the interpreter for all of them at once.

The kernel bounds what waits here: one request for each thread that waits for an answer, and a RELEASE for each file that was open
at the same time.

Thread-safety: `put` from any thread, `get` from one.
"""

from __future__ import annotations

import queue
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

from tmemfs.fuse import wire

#: Eight readers that ask all the time raise the p50 of loads from RAM 1.6 times with 1 ms, 1.1 times with 2 ms, and by less than
#: the runs differ (0.93 to 1.09) with 4 ms (tools/hostile.py).
BUSY_GAP_S: Final = 0.004
IDLE_GAP_S: Final = 0.0005
BURST_S: Final = 0.1
#: After a request for a page, this long counts as busy.
_BUSY_S: Final = 0.1
_ROOT: Final = 0


class Pace:
    """When the next request may be passed on. `page_requests` counts those of the page path."""

    def __init__(self, page_requests: Callable[[], int], now: float) -> None:
        self._page_requests = page_requests
        self._seen = page_requests()
        self._busy_until = now
        self._next = now

    def wait_s(self, now: float) -> float:
        """Seconds until the next request may be passed on."""
        return max(self._next - now, 0.0)

    def spend(self, now: float) -> None:
        """A request is passed on now."""
        count = self._page_requests()
        if count != self._seen:
            self._seen = count
            self._busy_until = now + _BUSY_S
        # Time in which nothing was passed on is credit, up to BURST_S of it.
        self._next = max(self._next, now - BURST_S) + (BUSY_GAP_S if now < self._busy_until else IDLE_GAP_S)


class Forwards:
    """Requests for pyfuse3, in the order in which they are passed on; `now` gives seconds."""

    def __init__(self, page_requests: Callable[[], int], now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._arrivals: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # of the one thread that calls `get`
        self._pace = Pace(page_requests, now())
        self._waiting: OrderedDict[int, deque[bytes]] = OrderedDict()
        self._releases: deque[bytes] = deque()
        self._may_release = False

    def put(self, request: bytes | None) -> None:
        """Add a request; None ends it all."""
        self._arrivals.put(request)

    def get(self) -> bytes | None:
        """The next request, once it may be passed on; None at the end, whatever waits then."""
        while True:
            if self._may_release and self._releases:
                self._may_release = False
                return self._releases.popleft()
            # Nothing waits: sleep until a request arrives.
            wait_s = self._pace.wait_s(self._now()) if self._waiting or self._releases else None
            try:
                request = self._arrivals.get(timeout=wait_s)
            except queue.Empty:
                return self._take()
            if request is None or not self._keep(request):
                # Root's requests allow a RELEASE as others do, or a root that opens and closes would let them pile up.
                self._may_release = True
                return request

    def _keep(self, request: bytes) -> bool:
        """Keep `request` until it may be passed on; False: it need not wait."""
        _, opcode, *_ = wire.HEADER.unpack_from(request)
        (user,) = wire.USER.unpack_from(request, wire.USER_AT)
        try:
            if opcode in wire.RELEASES:
                self._releases.append(request)
            elif user == _ROOT:
                return False
            elif user in self._waiting:
                self._waiting[user].append(request)
            else:
                self._waiting[user] = deque((request,))
        except MemoryError:
            return False  # sooner than it should be, but it must not be lost: a process waits for the answer
        return True

    def _take(self) -> bytes:
        """The first request of the user who has waited longest, and is the last one afterwards; a RELEASE if there is none."""
        self._pace.spend(self._now())
        if not self._waiting:
            return self._releases.popleft()
        self._may_release = True
        user, requests = self._waiting.popitem(last=False)
        request = requests.popleft()
        if requests:
            self._waiting[user] = requests
        return request
