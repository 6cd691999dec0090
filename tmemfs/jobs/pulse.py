"""The pulse: every two seconds the event loop says in the status region that it runs, and what the store holds.

A reader learns from it that the worker is not stopped, and has figures of the last seconds though the worker does not answer. The
watchdog, whose time is parsed here, is such a reader.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import trio

from tmemfs.errors import OutOfRange
from tmemfs.store.tmem import Tmem
from tmemfs.system.status_region import Word
from tmemfs.units import parse_seconds

#: An idle daemon is to wake less than once per second, its supervisor included.
PULSE_S: Final = 2.0
#: A worker that works may beat as late as this while the machine swaps.
LEAST_WATCHDOG_S: Final = 2.0
_LONGEST_WATCHDOG_S: Final = 86400.0


def parse_watchdog(text: str) -> float:
    """For how many seconds requests may wait for a worker that answers none; 0, for ever, by 'off'. Raises BadValue, OutOfRange."""
    if text.strip().lower() == "off":
        return 0.0
    seconds = parse_seconds(text)
    if not LEAST_WATCHDOG_S <= seconds <= _LONGEST_WATCHDOG_S:
        raise OutOfRange(f"{text.strip()} is not between {LEAST_WATCHDOG_S:g} seconds and a day: give for example 30, or off")
    return seconds


class Pulse:
    """Writes `words` of the status region, about `tmem`; `requests` counts those of the page path."""

    def __init__(self, words: memoryview, tmem: Tmem, requests: Callable[[], dict[str, int]]) -> None:
        self._words = words
        self._tmem = tmem
        self._requests = requests

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            self.beat()
            await trio.sleep(PULSE_S)

    def beat(self) -> None:
        """Write the words once."""
        words, tmem, requests = self._words, self._tmem, self._requests()
        words[Word.REQUESTS] = requests["requests"]
        words[Word.POISONED] = requests["poisoned"]
        words[Word.POOL_BYTES] = tmem.pool_bytes
        words[Word.TIER_BYTES] = tmem.extents.held_bytes
        words[Word.PAGES_STORED] = tmem.pages_stored
        words[Word.COMPRESSED_BYTES] = tmem.compressed_bytes
        words[Word.PULSE_NS] = time.monotonic_ns()
        words[Word.PULSE] += 1
