"""Throttle: how work in the background yields the interpreter to threads that serve pages.

A request that finds the interpreter taken waits for the rest of a step, and then to be scheduled, which costs more than the step.
So while there are requests, each step is followed by a pause many times as long; when there are none, a short pause follows every
few steps.

Work that somebody waits for hurries: it is done as if there were no requests.

Thread-safety: any thread, several at once. What it remembers of requests and steps is a hint, so only `hurry` takes a lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tmemfs.store.tmem import Tmem

#: While there are requests. What shorter and longer ones give: docs/benchmarks.md, faults while the cleaner works.
BUSY_S: Final = 0.0002
#: Without: this long for every STEPS.
IDLE_S: Final = 0.00005
STEPS: Final = 4
#: How long after a request the next one is still expected.
_EXPECTED_S: Final = 0.05


class Throttle:
    """To be called after each step; a step is a record copied, or a few handles moved."""

    def __init__(self, tmem: Tmem) -> None:
        self._counts = tmem.counts
        self._served = -1
        self._busy_until = 0.0
        self._steps = 0
        self._lock = threading.Lock()
        self._hurrying = 0

    def __call__(self) -> None:
        """Yield the interpreter, for longer while there are requests."""
        # Counters that the page path keeps anyway say whether it has work. Asking it would cost each request something.
        counts = self._counts
        served = counts.loads_ram + counts.loads_disk + counts.stores
        if served != self._served:
            self._served = served
            self._busy_until = time.monotonic() + _EXPECTED_S
        self._steps += 1  # without the lock: several threads may miss a step, and pause one record later
        if not self._hurrying and time.monotonic() < self._busy_until:
            time.sleep(BUSY_S)
        elif not self._steps % STEPS:
            time.sleep(IDLE_S)

    @contextmanager
    def hurry(self) -> Iterator[None]:
        """Somebody waits for the throttled work, also for what has begun already."""
        with self._lock:
            self._hurrying += 1
        try:
            yield
        finally:
            with self._lock:
                self._hurrying -= 1
