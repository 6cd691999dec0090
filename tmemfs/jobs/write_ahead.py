"""Write-ahead: the oldest segments are written before their memory is wanted, and stay in RAM.

Such a clean copy gives its frame back without any I/O, however slow the disk is: to a store that finds no free frame, to the
shrinker, and under pressure. So `percent` of the segments in RAM are kept clean. Only segments that have rested are written
(policy/clean_share.py), one at a time, and the disk rests for longer than it writes.

A write that fails leaves its segment as it was. The next one is tried after a pause: nobody waits for it.

Invariant: 1. Every plan taken from the store is committed or aborted.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Final

import trio

from tmemfs.errors import BadValue, OutOfRange, TierError
from tmemfs.jobs.executor import Executor
from tmemfs.jobs.notices import Wakeup
from tmemfs.policy.clean_share import AgeClock, copies_wanted
from tmemfs.store.plans import WriteBack
from tmemfs.store.tmem import Tmem
from tmemfs.system.memory import ordinary_thread
from tmemfs.tiers.tier import Tier
from tmemfs.units import parse_seconds

log = logging.getLogger(__name__)

#: Percent of the pool's segments.
DEFAULT_PERCENT: Final = 25
MOST_PERCENT: Final = 90
#: Seconds for which a segment rests before it is written ahead.
DEFAULT_REST_S: Final = 30.0
_MOST_REST_S: Final = 86400.0
#: Time at rest per time of a write: the disk is there for others.
_REST: Final = 3
#: After a write that failed.
_FAILED_S: Final = 30.0


def parse_writeahead(text: str) -> int:
    """The percentage meant by control/writeahead: '25', '25%' or '0'. Raises BadValue, OutOfRange."""
    number = text.strip().removesuffix("%")
    if not (number.isascii() and number.isdigit()):
        raise BadValue(f"{text.strip()!r} is no percentage: write for example {DEFAULT_PERCENT}, or 0 for none")
    percent = int(number)
    if percent > MOST_PERCENT:
        raise OutOfRange(f"{percent}% is above {MOST_PERCENT}%: the rest is for what was stored last")
    return percent


def parse_rest(text: str) -> float:
    """The seconds meant by control/writeahead.rest, a day at most. Raises BadValue, OutOfRange."""
    seconds = parse_seconds(text)
    if seconds > _MOST_REST_S:
        raise OutOfRange(f"{text.strip()} is more than a day: give for example {DEFAULT_REST_S:g}")
    return seconds


class WriteAhead:
    """Keeps `percent` of the segments of `tmem` on `tier` as well. `wakeup` says that the store has changed.

    `note` is told of each segment that was written.
    """

    def __init__(self, tmem: Tmem, tier: Tier, wakeup: Wakeup, executor: Executor, note: Callable[[WriteBack], None]) -> None:
        self.percent = DEFAULT_PERCENT
        #: Since the start, in whole blocks.
        self.written_bytes = 0
        self._note = note
        self._tmem = tmem
        self._tier = tier
        self._wakeup = wakeup
        self._executor = executor
        self._clock = AgeClock(DEFAULT_REST_S)

    def set_percent(self, percent: int) -> None:
        """Keep `percent` clean from now on; 0: none. What is clean stays so until its frame is wanted. In trio's thread."""
        self.percent = percent
        self._wakeup.set()

    @property
    def rest_s(self) -> float:
        """For how long a segment rests before it is written ahead."""
        return self._clock.rest_s

    def set_rest(self, seconds: float) -> None:
        """Write what has rested for `seconds` from now on. In trio's thread."""
        self._clock.rest_s = seconds
        self._wakeup.set()

    async def run(self) -> None:
        """Write ahead until cancelled."""
        while True:
            self._wakeup.clear()
            now = time.monotonic()
            self._clock.note(now, self._tmem.segments.next_sequence)
            if self._is_wanted:
                wait_s = await self._write_next(now)
            else:
                wait_s = math.inf
            if wait_s:
                with trio.move_on_after(wait_s):
                    await self._wakeup.wait()

    @property
    def _is_wanted(self) -> bool:
        tmem = self._tmem
        has_tier = self.percent > 0 and self._tier.capacity_bytes > 0
        return has_tier and copies_wanted(len(tmem.arena.used), len(tmem.clean), self.percent / 100) > 0

    async def _write_next(self, began: float) -> float:
        """Write one segment, and let the disk rest; for how long to wait for another that has rested."""
        try:
            if not await self._executor.run(self._write_one):
                return self._clock.wait_s(began)
        except TierError as error:
            log.warning("a segment could not be written ahead of need: %s", error)
            await trio.sleep(_FAILED_S)
            return 0
        await trio.sleep((time.monotonic() - began) * _REST)
        return 0

    def _write_one(self) -> bool:
        """Write the oldest segment that has rested; whether there was one. In a thread. Raises TierError."""
        ordinary_thread()
        plan = self._tmem.plan_write_ahead(self._clock.youngest)
        if plan is None:
            return False
        try:
            self._tier.write(plan.extent, plan.data, plan.sequence)
        except BaseException:
            self._tmem.abort_write_back(plan)
            raise
        self._tmem.commit_write_ahead(plan)
        self.written_bytes += len(plan.data)
        self._note(plan)
        return True
