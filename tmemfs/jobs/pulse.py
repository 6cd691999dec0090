"""The pulse: once per second the event loop says in the status region that it runs, and what the store holds.

A reader learns from it that the worker is not stopped, and has figures of the last second though the worker does not answer.
"""

from __future__ import annotations

from collections.abc import Callable
import time
from typing import Final

import trio

from tmemfs.store.tmem import Tmem
from tmemfs.system.status_region import Word

PULSE_S: Final = 1.0


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
        words[Word.PULSE] += 1
        words[Word.PULSE_NS] = time.monotonic_ns()
