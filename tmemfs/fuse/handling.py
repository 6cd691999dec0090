"""Handling: which request each thread of the page path handles now, in words that the supervisor reads.

A word is the `unique` of the request that the thread handles, or, with the bit IDLE, of the last one that it handled; 0 means none
so far. A word that changes shows that requests are answered. The words of a worker that died show what it may have died of.

One more word behind those of the threads says whether any request was answered.

The leader's word is the first one: it is written in PagePath.lead, for it costs each load 0.1 us.

Thread-safety: each thread writes its own word, which it takes with `join`. Any thread may call `note_answer`.
"""

from __future__ import annotations

import threading
from array import array
from typing import Final

from tmemfs.system.status_region import MOST_HANDLING

#: In no `unique`: the kernel counts up by 2, and marks what it hands out again with bit 63.
IDLE: Final = 1 << 62
LEADER: Final = 0


class Handling:
    """`words`, MOST_HANDLING of threads and the one of answers; without them, words that nobody reads."""

    def __init__(self, words: memoryview | None = None) -> None:
        #: Those of the supervisor, the leader's first.
        self.words = memoryview(array("Q", [0]) * (MOST_HANDLING + 1)) if words is None else words
        self._mine = _Mine()

    def join(self, number: int) -> None:
        """Give the calling thread word `number`."""
        self._mine.number = number

    def begin(self, unique: int) -> None:
        """The calling thread handles `unique`."""
        self.words[self._mine.number] = unique

    def end(self) -> None:
        """The calling thread has handled it."""
        self.words[self._mine.number] |= IDLE
        self.note_answer()

    def note_answer(self) -> None:
        """A request was answered."""
        self.words[MOST_HANDLING] = 1


class _Mine(threading.local):
    """Number of the calling thread's word; the last one for a thread that took none, as in tests."""

    number = MOST_HANDLING - 1
