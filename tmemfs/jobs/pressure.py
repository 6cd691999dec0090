"""Pressure: watches the signals of memory pressure, and steers the shrinker by the controller (policy/pressure_controller.py).

It samples when something moves: pages are being stored, a stall or a threshold is told; not before what was there at once, above
two reserves, can have gone. From then on it samples every SAMPLE_S until nothing has moved for QUIET_S, and while a swap stall is
suspected (swap_stall.py), and then waits again. Only while there is little headroom and much in the pool, while the pool grows
back, and while the kernel's workers have priority, it samples every IDLE_S.

    mode auto     the controller acts
    mode manual   signals are watched and shown; the pool moves by its limits, its watermarks and `shrink`
    mode off      no signal is sampled

Invariant: 1. What the controller has not asked for is not limited: in any other mode than auto, ceiling and strictness are lifted.
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
from tmemfs.jobs.kernel_tuning import Tuning
from tmemfs.jobs.notices import Wakeup
from tmemfs.jobs.pool_size import SMALL_POOL_BYTES, PoolSize
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
#: Nothing takes memory faster: a program that locks what the machine had in use before takes 4 GB/s.
FASTEST_BYTES_PER_S: Final = 5e9
LONGEST_REST_S: Final = 0.25
#: Something stalls if it waits for memory this share of the time.
STALL_SHARE: Final = 0.1
IDLE_S: Final = 2.0
#: A state that ended sooner is counted, not logged.
LASTED_S: Final = 1.0
#: While memory is short, new workers of the kernel are sampled for this often.
WORKERS_S: Final = 0.1
#: They keep their priority for so long: one that comes without it just as memory is short again waits with all others.
WORKERS_KEPT_S: Final = 10.0
#: The reserve: this share of what memory there is, within these bounds.
RESERVE_SHARE: Final = 1 / 16
LEAST_RESERVE_BYTES: Final = 16 << 20
LARGEST_RESERVE_BYTES: Final = 512 << 20
#: The whole pool grows back in this time.
GROWTH_S: Final = 60
#: With this many reserves of headroom and more, nothing is sampled while nothing moves.
_FAR: Final = 4


def parse_mode(text: str) -> str:
    """A mode of control/pressure.mode. Raises BadValue."""
    if text.strip() not in MODES:
        raise BadValue(f"{text.strip()!r} is no mode of pressure: choose {', '.join(MODES)}")
    return text.strip()


@dataclass(slots=True)
class PressureCounts:
    """Since the start. `first_release_us`: from the last time headroom fell below the reserve to the first frame given back."""

    samples: int = 0
    shrinks: int = 0
    stalls: int = 0
    strict: int = 0
    first_release_us: int = 0


class _Told:
    """What the log says of the state: whether memory is short. A change is told once it has lasted LASTED_S."""

    def __init__(self) -> None:
        self._is_short = False
        self._changed_at: float | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a change is not told yet."""
        return self._changed_at is not None

    def tell(self, state: str, now: float, headroom: int) -> None:
        """The state is `state` now; a line in the log if that has been new for long enough."""
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
        tuning: Tuning,
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
        self._told = _Told()

    def sample_again(self) -> None:
        """Something moves: see whether there is pressure. In trio's thread."""
        self._wakeup.set()

    def set_mode(self, mode: str) -> None:
        """Change the mode. In trio's thread."""
        self.mode = mode
        if mode != "auto":
            self.swap_stall.end()
            self._apply(Decision())
            self._take_priority()
        self.sample_again()

    def set_reserve(self, reserve_bytes: int) -> None:
        """Leave so much memory to others. Raises OutOfRange."""
        most = self.signals.memory_bytes // 2
        if not 0 < reserve_bytes <= most:
            raise OutOfRange(
                f"a reserve of {reserve_bytes} bytes is not between 1 and half of the memory ({most}): give for example 5%"
            )
        self.settings = Settings(reserve_bytes, self.settings.growth_bytes)
        for armed in self._armed:
            armed.cancel()
        self.sample_again()

    def set_growth(self, growth_bytes: int) -> None:
        """Grow back by so many bytes a second. Raises OutOfRange."""
        if growth_bytes <= 0:
            raise OutOfRange("a pool that grows by 0 bytes a second stays small for ever: give for example 16M")
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
                    await self._look_until_lost()
                    nursery.cancel_scope.cancel()
                self._reopen_signals()
                if reopened_at == self.counts.samples:  # what was opened before was of no use: the supervisor pauses between tries
                    raise SignalsLost("signals of pressure are lost as soon as they are opened")
                reopened_at = self.counts.samples
        finally:
            self._take_priority()
            self.swap_stall.end()

    async def _look_until_lost(self) -> None:
        """Sample until a signal has gone: its cgroup was removed."""
        try:
            await self._look_on()
        except SignalsLost as error:
            log.warning("%s: the signals of the cgroup where the daemon is now are opened", error)

    def _reopen_signals(self) -> None:
        lost, self.signals = self.signals, self._open_signals()
        lost.close()
        self._stalled_us = self.signals.stalled_us()

    async def _look_on(self) -> None:
        moved_at, seen = time.monotonic(), (0, 0.0)
        while True:
            self._wakeup.clear()
            if self.mode != "off":
                self._take_sample()
                now, before, seen = (
                    time.monotonic(),
                    seen,
                    (self._tmem.counts.stores, round(self.headroom / self.settings.reserve_bytes, 1)),
                )
                moved_at = now if seen != before or self.decision.state in (SHRINKING, CRITICAL) else moved_at
                is_moving = now - moved_at < QUIET_S and self.headroom < _FAR * self.settings.reserve_bytes
                if is_moving or self.swap_stall.is_suspected or self.decision.is_calming:
                    await trio.sleep(SAMPLE_S)
                    continue
            with trio.move_on_after(self._idle_s):
                await self._wakeup.wait()
                await trio.sleep(max(self._sampled_at + self._rest_s - time.monotonic(), 0))

    @property
    def _rest_s(self) -> float:
        """How long nothing needs to be sampled at though something moves."""
        spare = min(self.headroom, self._available) - 2 * self.settings.reserve_bytes if self.mode != "off" else 0
        return min(max(spare / FASTEST_BYTES_PER_S, SAMPLE_S), LONGEST_REST_S)

    @property
    def _idle_s(self) -> float:
        """How long nothing needs to be sampled at while nothing moves."""
        is_near = self.mode != "off" and self.headroom < _FAR * self.settings.reserve_bytes
        is_to_end = (
            self._workers_at > -math.inf
            or self._told.is_pending
            or (self.decision.state == RELAXED and not math.isinf(self.decision.ceiling))
        )
        return IDLE_S if is_to_end or (is_near and self._tmem.pool_bytes > SMALL_POOL_BYTES) else math.inf

    def _take_sample(self) -> None:
        memory = self.signals.memory()
        self.headroom, self._available = memory.headroom, memory.available
        now, stalled_us = time.monotonic(), self.signals.stalled_us()
        stalled = stalled_us - self._stalled_us > STALL_SHARE * 1e6 * max(now - self._sampled_at, SAMPLE_S)
        self._sampled_at, self._stalled_us = now, stalled_us
        self.counts.samples += 1
        self.counts.stalls += stalled
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
            self._see_to_workers(now, memory.available)
            self.swap_stall.sample(now, memory, self.settings.reserve_bytes)
        else:
            self.decision = Decision(found.state, sample=found.sample, calm_since=found.calm_since)

    def _apply(self, found: Decision) -> None:
        before, self.decision = self.decision, found
        self.counts.strict += found.state != RELAXED and before.state == RELAXED
        self.counts.shrinks += found.ceiling < min(self._tmem.pool_bytes, before.ceiling)
        self._size.press(found.ceiling, is_short=found.state != RELAXED)
        self._told.tell(found.state, self._sampled_at, self.headroom)

    def _see_to_workers(self, now: float, available: int) -> None:
        """The kernel's workers need priority where nothing is left, also where much could be swapped out: by way of them."""
        if available < 2 * self.settings.reserve_bytes and self.tuning.is_engaged:
            self._short_at = now
            if now - self._workers_at >= WORKERS_S:
                self._workers_at = now
                self.tuning.give_priority()
        elif now - self._short_at >= WORKERS_KEPT_S:
            self._take_priority()

    def _take_priority(self) -> None:
        if self._workers_at > -math.inf:  # else there is none of ours, and another daemon may need it
            self.tuning.take_priority()
        self._workers_at = self._short_at = -math.inf

    def _time_first_release(self, found: Decision) -> None:
        """How long it took from the first sign to the first frame, in steps of SAMPLE_S."""
        released = self._shrunk.released_bytes
        if found.state not in (SHRINKING, CRITICAL):
            self._fell_at = None if found.state == RELAXED else self._fell_at
        elif self._fell_at is None:
            self._fell_at, self._released_before = time.monotonic(), released
        if self._fell_at is not None and released > self._released_before:
            self.counts.first_release_us = int((time.monotonic() - self._fell_at) * 1e6)
            self._released_before = 1 << 62  # only the first

    async def _watch(self, fd: int, clear: Callable[[], object]) -> None:
        """Sample whenever `fd` tells something."""
        while True:
            await trio.lowlevel.wait_readable(fd)
            clear()
            self.sample_again()
            await trio.sleep(SAMPLE_S)

    async def _watch_threshold(self, limit: CgroupLimit) -> None:
        """Sample whenever a cgroup comes near its limit (v1 tells)."""
        with suppress(OSError):
            while True:  # until the reserve changes, and then anew
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
    """Take what `event` has counted."""
    with suppress(BlockingIOError):
        os.eventfd_read(event)


def default_settings(memory_bytes: int, pool_bytes: int) -> Settings:
    """The reserve and the growth for a machine, or a cgroup, with so much memory and a pool of so much."""
    reserve = min(max(int(memory_bytes * RESERVE_SHARE), LEAST_RESERVE_BYTES), LARGEST_RESERVE_BYTES)
    return Settings(reserve, max(pool_bytes // GROWTH_S, SEGMENT_BYTES))
