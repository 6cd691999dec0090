"""The recompressor: encodes idle segments again with zstd and a dictionary, in the background, if it is switched on.

It looks for idle segments every LOOK_S, works a quarter of the time at most, yields the interpreter between records, and stops
while the pool has no free frame. It trains a dictionary when it has none, and another one when the last does not help any more.
Segments that do not gain from a dictionary trained on them are left alone.

Invariant: 1. Every merge taken from the store is committed or aborted.
"""

from __future__ import annotations

import math
import time
from collections import deque
from functools import partial
from typing import Final

import trio

from tmemfs.errors import BadValue
from tmemfs.jobs.executor import Executor
from tmemfs.jobs.throttle import Throttle
from tmemfs.store.codec import ZSTD_LEVELS, parse_level
from tmemfs.store.dictionary import Encoder, train
from tmemfs.store.recompression import Recompression, Use, reencode
from tmemfs.store.tmem import Tmem
from tmemfs.system.memory import ordinary_thread

#: 0.688 of lz4's bytes at 15 us per page; level 6 makes it 0.652 at 53 us, level 1 0.698 at 11 us (docs/benchmarks.md).
DEFAULT_LEVEL: Final = 3
#: A segment rests this long, at least, before it counts as idle.
LOOK_S: Final = 10.0
#: Time at rest per time at work.
_REST: Final = 3
#: Each takes memory in the daemon for as long as a segment was encoded with it.
_MOST_DICTIONARIES: Final = 16


def parse_recompress(text: str) -> int | None:
    """The level meant by control/recompress: 'off' is None, 'zstd' the default, 'zstd:LEVEL' that. Raises BadValue."""
    name, _, level = text.strip().partition(":")
    if name == "zstd":
        return parse_level(level) if level else DEFAULT_LEVEL
    if text.strip() == "off":
        return None
    raise BadValue(f"{text.strip()!r} is no way to recompress: choose off, zstd or zstd:LEVEL (1 to {ZSTD_LEVELS[-1]})")


class Recompressor:
    """Recompresses idle segments of `tmem` in the thread of `executor`, while `level` is not None."""

    def __init__(self, tmem: Tmem, throttle: Throttle, executor: Executor) -> None:
        self.level: int | None = None
        self._tmem = tmem
        self._recompression = Recompression(tmem)
        self._encoder: Encoder | None = None
        self._is_fresh = self._is_outdated = False
        self._throttle = throttle
        self._changed = trio.Event()
        self._executor = executor
        self.counts = self._recompression.counts

    @property
    def dictionaries(self) -> int:
        """Dictionaries in use."""
        return len(self._tmem.dictionaries)

    def set_level(self, level: int | None) -> None:
        """Encode at `level` of zstd from now on, or stop. In trio's thread."""
        self.level = level
        self._changed.set()

    async def run(self) -> None:
        """Look again and again until cancelled."""
        while True:
            self._changed = trio.Event()
            if self.level is not None:
                await self._work_on(self._recompression.look(self._encoder))
            with trio.move_on_after(math.inf if self.level is None else LOOK_S):
                await self._changed.wait()

    async def _work_on(self, idle: deque[Use]) -> None:
        """Recompress the segments of `idle`, one merge at a time."""
        self._is_fresh = False
        # A merge takes a frame before it frees any. The last ones are for stores, so it ends when the pool is full.
        while idle and self.level is not None and self._tmem.arena.has_free_frame:
            began = time.monotonic()
            await self._executor.run(partial(self._encode_some, idle, self.level))
            await trio.sleep((time.monotonic() - began) * _REST)  # a background job is to cost a quarter of one core at most

    def _encode_some(self, idle: deque[Use], level: int) -> None:
        """One merge of the first of `idle`; in a thread."""
        ordinary_thread()
        encoder = self._encoder_at(level, idle)
        if encoder is None:  # too few pages to learn from: more of them may be idle at the next look
            idle.clear()
            return
        plan = self._recompression.plan(idle, encoder)
        if plan is None:
            return
        try:
            copied = self._tmem.merges.copy_in_ram(plan, self._throttle, partial(reencode, encoder))
        except BaseException:  # also for a bug: a plan that nobody ends keeps its segments out of every list
            self._tmem.merges.abort(plan)
            raise
        if not self._recompression.commit(plan, copied):
            # A fresh dictionary was trained on these very pages: another one would not do better.
            if self._is_fresh or self.dictionaries >= _MOST_DICTIONARIES:
                self._recompression.give_up(plan)
            else:
                self._is_outdated = True
        # In front again, in their order: the oldest segments leave RAM next.
        idle.extendleft(reversed(self._recompression.left_of(plan)))

    def _encoder_at(self, level: int, idle: deque[Use]) -> Encoder | None:
        """The encoder in use, or one with a new dictionary; None if nothing can be learned from `idle`."""
        if self._encoder is None or self._is_outdated:
            data = train(self._recompression.samples(idle))
            if data is None:
                return None
            with self._tmem.lock:
                self._encoder = Encoder(self._tmem.dictionaries.add(data), level)
            self._is_fresh, self._is_outdated = True, False
        elif self._encoder.level != level:
            self._encoder = Encoder(self._encoder.dictionary, level)
        return self._encoder
