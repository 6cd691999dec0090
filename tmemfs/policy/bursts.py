"""When a burst of requests begins and ends. Pure: time is passed in.

While CPUs are awake a load takes some 50 us less, and a store of the 32 pages that the kernel reclaims at once some 90 us
(docs/decisions/0022). So a store counts as two requests. A program whose loads come at BURST_PER_S, one every 625 us, spends a
twelfth of its time on that. Fewer loads gain less, while the idle CPUs would have to poll nearly all the time.

A burst begins with BURST_REQUESTS requests at that rate, and ends when requests come at less than half of it.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

#: With 8 or 16 what is over by then paid for a burst and had nothing of it; with 32 what goes on gained as much.
BURST_REQUESTS: Final = 32
BURST_S: Final = 0.02
BURST_PER_S: Final = BURST_REQUESTS / BURST_S
STORE_WEIGHT: Final = 2
#: From the beginning of a burst to the first look at it. Each further look comes after twice the time, up to LONGEST_LOOK_S: a look
#: takes 0.1 ms of CPU, in which the page path may wait for the interpreter.
LOOK_S: Final = 0.01
LONGEST_LOOK_S: Final = 0.08


class Bursts:
    """Judges requests. `begins` is called for each of them while there is no burst, `goes_on` from time to time while there is."""

    def __init__(self) -> None:
        # A request, and the BURST_REQUESTS - 1 before it.
        self._times = deque([-math.inf] * (BURST_REQUESTS - 1), BURST_REQUESTS - 1)
        self._requests = 0
        self._looked = 0.0
        #: Time until the next look at the burst.
        self.look_s = LOOK_S

    def begins(self, now: float, weight: int = 1) -> bool:
        """Whether a burst begins with the request of this moment, which counts `weight` times."""
        for _ in range(weight):
            first = self._times[0]
            self._times.append(now)
        return now - first <= BURST_S

    def begin(self, requests: int, now: float) -> None:
        """A burst has begun; `requests` is how many there were since the start."""
        self._requests, self._looked, self.look_s = requests, now, LOOK_S

    def goes_on(self, requests: int, now: float) -> bool:
        """Whether the burst goes on, judged by the requests since the last look."""
        came, took = requests - self._requests, now - self._looked
        self._requests, self._looked, self.look_s = requests, now, min(2 * self.look_s, LONGEST_LOOK_S)
        return came >= took * BURST_PER_S / 2
