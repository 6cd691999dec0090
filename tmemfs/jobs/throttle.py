"""Throttle: how work in the background lets go of the interpreter, for whoever waits for a page.

A request that finds the interpreter taken waits for the rest of a step, and to be woken, which costs more than the step. So while
there are requests every step is followed by a breath many times as long; without, a few steps by a short one.

Work that somebody waits for hurries: it is done as if there were no requests.

Thread-safety: any thread, several at once; what it remembers of requests and steps is a hint.
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
        """Let go of the interpreter, for as long as it is wanted."""
        counts = self._counts
        served = counts.loads_ram + counts.loads_disk + counts.stores
        if served != self._served:
            self._served = served
            self._busy_until = time.monotonic() + _EXPECTED_S
        self._steps += 1
        if not self._hurrying and time.monotonic() < self._busy_until:
            time.sleep(BUSY_S)
        elif not self._steps % STEPS:
            time.sleep(IDLE_S)

    @contextmanager
    def hurry(self) -> Iterator[None]:
        """Somebody waits for what breathes: also for what goes on already."""
        with self._lock:
            self._hurrying += 1
        try:
            yield
        finally:
            with self._lock:
                self._hurrying -= 1
