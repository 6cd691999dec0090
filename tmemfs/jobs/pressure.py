"""Pressure: samples the signals of memory pressure, and sets the pool's ceiling by the controller (policy/pressure_controller.py).

It takes a sample when something changes: pages are stored, or the kernel signals a stall or a threshold. After a
sample it sleeps for as long as it would take to consume the headroom above two reserves. From then on it samples every SAMPLE_S,
until nothing has changed for QUIET_S, and as long as a swap stall is suspected (swap_stall.py). Then it waits again. It samples
every IDLE_S only while there is little headroom and much in the pool, while the pool grows back, and while the kernel's workers
have our priority.

    mode auto     the controller acts
    mode manual   signals are sampled and shown; the pool follows its limits, its watermarks and `shrink`
    mode off      no signal is sampled

Invariant: 1. In any other mode than auto the controller limits nothing: there is no ceiling, and memory does not count as short.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from tmemfs.errors import BadValue, OutOfRange
from tmemfs.jobs.kernel_tuning import KernelTuning
from tmemfs.jobs.notices import Wakeup
from tmemfs.jobs.pool_size import PRESSURE_FLOOR_BYTES, PoolSize
from tmemfs.jobs.shrinker import ShrinkCounts
from tmemfs.jobs.swap_stall import SwapStallDetector
from tmemfs.policy.pressure_controller import CRITICAL, RELAXED, SHRINKING, Decision, Sample, Settings, decide
from tmemfs.store.tmem import Tmem
from tmemfs.system.pressure_signals import CgroupLimit, PressureSignals, SignalsLost
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES

log = logging.getLogger(__name__)

MODES: Final = ("auto", "manual", "off")
#: A program that takes 1 GB a second takes 10 MB between two samples.
SAMPLE_S: Final = 0.01
QUIET_S: Final = 1.0
#: No program takes memory faster: one that locks memory which the machine has used before takes 4 GB/s.
FASTEST_BYTES_PER_S: Final = 5e9
LONGEST_REST_S: Final = 0.25
#: Something stalls if it waits for memory this share of the time.
STALL_SHARE: Final = 0.1
IDLE_S: Final = 2.0
#: A state that ends sooner is counted, but not logged.
LASTED_S: Final = 1.0
#: While memory is short, new workers of the kernel are looked for this often.
WORKERS_S: Final = 0.1
#: They keep their priority for this long. Without it, a worker that is created just as memory is short again waits like any other.
WORKERS_KEPT_S: Final = 10.0
#: The default reserve: this share of the memory there is, within these bounds.
RESERVE_SHARE: Final = 1 / 16
LEAST_RESERVE_BYTES: Final = 16 << 20
LARGEST_RESERVE_BYTES: Final = 512 << 20
#: The whole pool grows back in this time.
GROWTH_S: Final = 60
#: With this many reserves of headroom or more, no sample is taken while nothing changes.
_FAR: Final = 4


def parse_mode(text: str) -> str:
    """A mode of control/pressure.mode. Raises BadValue."""
    if text.strip() not in MODES:
        raise BadValue(f"{text.strip()!r} is no mode of pressure: choose {', '.join(MODES)}")
    return text.strip()


@dataclass(slots=True)
class PressureCounts:
    """Since the start. `first_release_us`: from the last time headroom fell below the reserve to the first frame released."""

    samples: int = 0
    shrinks: int = 0
    stalls: int = 0
    strict: int = 0
    first_release_us: int = 0


class _StateLog:
    """What the log says of the state: whether memory is short. A change is logged once it has lasted LASTED_S."""

    def __init__(self) -> None:
        self._is_short = False
        self._changed_at: float | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a change is not logged yet."""
        return self._changed_at is not None

    def note(self, state: str, now: float, headroom: int) -> None:
        """The state is `state` now; log it if it has changed and lasted for long enough."""
        if (state != RELAXED) == self._is_short:
            self._changed_at = None
        elif self._changed_at is None:
            self._changed_at = now
        elif now - self._changed_at >= LASTED_S:
            self._is_short, self._changed_at = not self._is_short, None
            log.info("memory is %s, %d MiB of headroom", state, headroom >> 20)


class Pressure:
    """Sets the ceiling of `size` by `signals`. `run` must be running in trio.

    `shrunk` counts what the shrinker has done, `wakeup` is set when frames were taken or have become free.
    """

    def __init__(
        self,
        tmem: Tmem,
        size: PoolSize,
        shrunk: ShrinkCounts,
        wakeup: Wakeup,
        tuning: KernelTuning,
        signals: Callable[[], PressureSignals] = PressureSignals,
    ) -> None:
        self.counts = PressureCounts()
        self.mode = "auto"
        self.decision = Decision()
        self._open_signals = signals
        self.signals = signals()
        self.settings = default_settings(self.signals.memory_bytes, size.marks.max)
        memory = self.signals.memory()
        self.headroom, self._available = memory.headroom, memory.available
        self._tmem = tmem
        self._size = size
        self._shrunk = shrunk
        self._wakeup = wakeup
        self._stalled_us = self.signals.stalled_us()
        self._sampled_at = time.monotonic()
        self._armed: set[trio.CancelScope] = set()
        self._fell_at: float | None = None
        self._released_before = 0
        self.tuning = tuning
        self._workers_at = self._short_at = -math.inf
        self.swap_stall = SwapStallDetector(tmem, tuning)
        self._state_log = _StateLog()

    def sample_again(self) -> None:
        """Something has changed: see whether there is pressure. In trio's thread."""
        self._wakeup.set()

    def set_mode(self, mode: str) -> None:
        """Change the mode. In trio's thread."""
        self.mode = mode
        if mode != "auto":
            self.swap_stall.end()
            self._apply(Decision())  # no ceiling (invariant 1)
            self._take_priority()
        self.sample_again()

    def set_reserve(self, reserve_bytes: int) -> None:
        """Leave `reserve_bytes` of memory to others. Raises OutOfRange."""
        most = self.signals.memory_bytes // 2
        if not 0 < reserve_bytes <= most:
            raise OutOfRange(
                f"a reserve of {reserve_bytes} bytes is not between 1 and half of the memory ({most}): give for example 5%"
            )
        self.settings = Settings(reserve_bytes, self.settings.growth_bytes)
        for armed in self._armed:  # each is armed at twice the reserve
            armed.cancel()
        self.sample_again()

    def set_growth(self, growth_bytes: int) -> None:
        """Let the pool grow back by `growth_bytes` per second. Raises OutOfRange."""
        if growth_bytes <= 0:
            raise OutOfRange("a pool that grows by 0 bytes per second stays small for ever: give for example 16M")
        self.settings = Settings(self.settings.reserve_bytes, growth_bytes)
        self.sample_again()

    async def run(self) -> None:
        """Watch and steer until cancelled."""
        reopened_at: int | None = None
        try:
            while True:
                async with trio.open_nursery() as nursery:
                    for stall in self.signals.stalls:
                        nursery.start_soon(self._watch, stall.fileno(), stall.clear)
                    for limit in self.signals.limits:
                        nursery.start_soon(self._watch_threshold, limit)
                    await self._sample_until_lost()
                    nursery.cancel_scope.cancel()  # ends the watches, whose descriptors are about to be closed
                self._reopen_signals()
                # No sample since the last time: opening them again at once would loop. The supervisor pauses between tries.
                if reopened_at == self.counts.samples:
                    raise SignalsLost("signals of pressure are lost as soon as they are opened")
                reopened_at = self.counts.samples
        finally:
            self._take_priority()
            self.swap_stall.end()

    async def _sample_until_lost(self) -> None:
        """Sample until a signal is lost, because its cgroup was removed."""
        try:
            await self._sample_on()
        except SignalsLost as error:
            log.warning("%s: the signals of the cgroup where the daemon is now are opened", error)

    def _reopen_signals(self) -> None:
        lost, self.signals = self.signals, self._open_signals()
        lost.close()  # after the new ones are open: if that fails, the supervisor's next run still has these to look at
        self._stalled_us = self.signals.stalled_us()

    async def _sample_on(self) -> None:
        changed_at, seen = time.monotonic(), (0, 0.0)
        while True:
            self._wakeup.clear()  # before the sample: what changes after it is seen by the next one
            if self.mode != "off":
                self._take_sample()
                now, before, seen = time.monotonic(), seen, self._seen
                changed_at = now if seen != before or self.decision.state in (SHRINKING, CRITICAL) else changed_at
                is_changing = now - changed_at < QUIET_S and self.headroom < _FAR * self.settings.reserve_bytes
                if is_changing or self.swap_stall.is_suspected or self.decision.is_calming:
                    await trio.sleep(SAMPLE_S)
                    continue
            with trio.move_on_after(self._idle_s):
                await self._wakeup.wait()
                await trio.sleep(max(self._sampled_at + self._rest_s - time.monotonic(), 0))

    @property
    def _seen(self) -> tuple[int, float]:
        """What two samples are compared by. Headroom is rounded, for it is never quite the same."""
        return self._tmem.counts.stores, round(self.headroom / self.settings.reserve_bytes, 1)

    @property
    def _rest_s(self) -> float:
        """How long no sample is needed although something changes: as long as it takes to use up what is above two reserves."""
        spare = min(self.headroom, self._available) - 2 * self.settings.reserve_bytes if self.mode != "off" else 0
        return min(max(spare / FASTEST_BYTES_PER_S, SAMPLE_S), LONGEST_REST_S)

    @property
    def _idle_s(self) -> float:
        """How long no sample is needed while nothing changes."""
        is_near = self.mode != "off" and self.headroom < _FAR * self.settings.reserve_bytes
        is_to_end = (
            self._workers_at > -math.inf
            or self._state_log.is_pending
            or (self.decision.state == RELAXED and not math.isinf(self.decision.ceiling))
        )
        return IDLE_S if is_to_end or (is_near and self._tmem.pool_bytes > PRESSURE_FLOOR_BYTES) else math.inf

    def _take_sample(self) -> None:
        memory = self.signals.memory()
        self.headroom, self._available = memory.headroom, memory.available
        now, stalled_us = time.monotonic(), self.signals.stalled_us()
        # Two samples may follow each other at once. The least interval keeps a stall of microseconds from counting as one.
        stalled = stalled_us - self._stalled_us > STALL_SHARE * 1e6 * max(now - self._sampled_at, SAMPLE_S)
        self._sampled_at, self._stalled_us = now, stalled_us
        self.counts.samples += 1
        self.counts.stalls += stalled
        # Counters since the start, not differences: the controller compares with the sample before, and so loses nothing.
        sample = Sample(
            at=now,
            headroom=self.headroom,
            pool=self._tmem.pool_bytes,
            top=self._size.marks.high,
            released=self._shrunk.pages * PAGE_BYTES,
            refaulted=self._tmem.counts.loads_disk * PAGE_BYTES,
            given=self._shrunk.released_bytes,
            stalled=stalled,
        )
        found = decide(self.decision, sample, self.settings)
        self._time_first_release(found)
        if self.mode == "auto":
            self._apply(found)
            self._update_priority(now, memory.available)
            self.swap_stall.sample(now, memory, self.settings.reserve_bytes)
        else:  # shown, but without a ceiling and a step (invariant 1)
            self.decision = Decision(found.state, sample=found.sample, calm_since=found.calm_since)

    def _apply(self, found: Decision) -> None:
        before, self.decision = self.decision, found
        self.counts.strict += found.state != RELAXED and before.state == RELAXED
        self.counts.shrinks += found.ceiling < min(self._tmem.pool_bytes, before.ceiling)
        self._size.press(found.ceiling, is_short=found.state != RELAXED)
        self._state_log.note(found.state, self._sampled_at, self.headroom)

    def _update_priority(self, now: float, available: int) -> None:
        """Give the kernel's workers our priority while little is available.

        What could still be swapped out does not count here: it is swapped out by way of these workers.
        """
        if available < 2 * self.settings.reserve_bytes and self.tuning.is_engaged:
            self._short_at = now
            # Again and again while memory is short, for the kernel creates workers meanwhile.
            if now - self._workers_at >= WORKERS_S:
                self._workers_at = now
                self.tuning.give_priority()
        elif now - self._short_at >= WORKERS_KEPT_S:
            self._take_priority()

    def _take_priority(self) -> None:
        if self._workers_at > -math.inf:  # otherwise we gave none, and another daemon may need what it gave
            self.tuning.take_priority()
        self._workers_at = self._short_at = -math.inf

    def _time_first_release(self, found: Decision) -> None:
        """Measure the time from the first sample of shortage to the first frame released, in steps of SAMPLE_S."""
        released = self._shrunk.released_bytes
        if found.state not in (SHRINKING, CRITICAL):
            self._fell_at = None if found.state == RELAXED else self._fell_at
        elif self._fell_at is None:
            self._fell_at, self._released_before = time.monotonic(), released
        if self._fell_at is not None and released > self._released_before:
            self.counts.first_release_us = int((time.monotonic() - self._fell_at) * 1e6)
            self._released_before = 1 << 62  # only the first frame counts

    async def _watch(self, fd: int, clear: Callable[[], object]) -> None:
        """Take a sample whenever `fd` is readable."""
        while True:
            await trio.lowlevel.wait_readable(fd)
            clear()
            self.sample_again()
            await trio.sleep(SAMPLE_S)  # stalls may be signalled faster than samples are worth taking

    async def _watch_threshold(self, limit: CgroupLimit) -> None:
        """Take a sample whenever a cgroup comes near its limit; only version 1 signals that."""
        with suppress(OSError):
            while True:  # armed again each time the reserve changes
                event = limit.watch(2 * self.settings.reserve_bytes)
                with trio.CancelScope() as armed:
                    self._armed.add(armed)
                    try:
                        await self._watch(event, partial(_read_event, event))
                    finally:
                        self._armed.discard(armed)
                        os.close(event)
                if not armed.cancelled_caught:
                    return


def _read_event(event: int) -> None:
    """Reset `event`, so that it is readable again only after the next signal."""
    with suppress(BlockingIOError):
        os.eventfd_read(event)


def default_settings(memory_bytes: int, pool_bytes: int) -> Settings:
    """The reserve and the growth for a machine or cgroup of `memory_bytes` and a pool of `pool_bytes`."""
    reserve = min(max(int(memory_bytes * RESERVE_SHARE), LEAST_RESERVE_BYTES), LARGEST_RESERVE_BYTES)
    return Settings(reserve, max(pool_bytes // GROWTH_S, SEGMENT_BYTES))
