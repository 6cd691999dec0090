"""The requests that wait for pyfuse3: root's at once, those of everybody else at a pace, in turn by user.

pyfuse3 and what it calls hold the interpreter's lock while they answer, and the page path needs that lock for each page. So all
other users together get a share of it: one request per BUSY_GAP_S while pages are asked for, one per IDLE_GAP_S while they are
not, and up to BURST_S worth of requests at once. A process that asks for more waits in the kernel, and takes no CPU meanwhile.
Users take turns, so one with a thousand processes delays another by no more than one with a single process does.

A RELEASE has the user id 0, whatever user closed the file. It was answered before it comes here (relay.py), and nobody waits for
it. One of them may go after each request that went, so they keep up with the opens, also with root's. The rest goes when nobody
else waits, at the same pace: a process that closes thousands of files does not take the interpreter for all of them at once.

What waits here is bounded by the kernel: one request for each thread that waits for an answer, and a RELEASE for each file that was
open at once.

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
#: Pages were asked for as long ago at most: 'busy'.
_BUSY_S: Final = 0.1
_ROOT: Final = 0


class Pace:
    """When the next request may go. `page_requests` counts those of the page path."""

    def __init__(self, page_requests: Callable[[], int], now: float) -> None:
        self._page_requests = page_requests
        self._seen = page_requests()
        self._busy_until = now
        self._next = now

    def wait_s(self, now: float) -> float:
        """Seconds until the next request may go."""
        return max(self._next - now, 0.0)

    def spend(self, now: float) -> None:
        """A request goes now."""
        count = self._page_requests()
        if count != self._seen:
            self._seen = count
            self._busy_until = now + _BUSY_S
        self._next = max(self._next, now - BURST_S) + (BUSY_GAP_S if now < self._busy_until else IDLE_GAP_S)


class Forwards:
    """Requests for pyfuse3 in the order in which they go there; `now` gives seconds."""

    def __init__(self, page_requests: Callable[[], int], now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._arrivals: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # of the one thread that gets
        self._pace = Pace(page_requests, now())
        self._waiting: OrderedDict[int, deque[bytes]] = OrderedDict()
        self._releases: deque[bytes] = deque()
        self._may_release = False

    def put(self, request: bytes | None) -> None:
        """Add a request; None ends it all."""
        self._arrivals.put(request)

    def get(self) -> bytes | None:
        """The next request, when it may go; None at the end, whatever waits then."""
        while True:
            if self._may_release and self._releases:
                self._may_release = False
                return self._releases.popleft()
            wait_s = self._pace.wait_s(self._now()) if self._waiting or self._releases else None
            try:
                request = self._arrivals.get(timeout=wait_s)
            except queue.Empty:
                return self._take()
            if request is None or not self._keep(request):
                self._may_release = True
                return request

    def _keep(self, request: bytes) -> bool:
        """Keep `request` until its turn; False: it need not wait."""
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
            return False  # sooner than it should go, but it must not be lost: somebody waits for the answer
        return True

    def _take(self) -> bytes:
        """The first request of the user whose turn it is, who is the last one then; a RELEASE if there is none."""
        self._pace.spend(self._now())
        if not self._waiting:
            return self._releases.popleft()
        self._may_release = True
        user, requests = self._waiting.popitem(last=False)
        request = requests.popleft()
        if requests:
            self._waiting[user] = requests
        return request
