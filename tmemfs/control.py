"""The control directory of a running daemon: a handler for reading, and one for writing, of each file in control_files.FILES.

Served by the file system (fuse/namespace.py), read and written through it by the command. A written value takes effect at once or
fails: EINVAL (not a value of this kind), ERANGE (cannot be honoured), EBUSY (not now), EAGAIN (a shrink fell short).

Knows the engine through `Services`; knows nothing of FUSE.

Invariant: 1. A file that the table calls writable has a handler for writing, and no other file has one.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tmemfs.control_files import ACKNOWLEDGE, FILES, ControlFile
from tmemfs.errors import BadValue, FellShort, OutOfRange
from tmemfs.jobs.compact_request import CompactRequest
from tmemfs.jobs.kernel_tuning import MODES as TUNING_MODES
from tmemfs.jobs.kernel_tuning import parse_tuning
from tmemfs.jobs.pressure import MODES, parse_mode
from tmemfs.jobs.recompressor import parse_recompress
from tmemfs.jobs.shrink_request import ShrinkRequest
from tmemfs.observe import report
from tmemfs.services import Services
from tmemfs.store.codec import CHOICES, parse_codec
from tmemfs.units import SEGMENT_BYTES, parse_size

Read = Callable[[], str]
Write = Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Attribute:
    """One file with its handlers. `read` gives its text with the newline; `write` takes a value, or raises TmemfsError."""

    file: ControlFile
    read: Read
    write: Write | None = None

    @property
    def name(self) -> str:
        """Name in the directory."""
        return self.file.name

    @property
    def mode(self) -> int:
        """Permission bits."""
        return self.file.mode


class ControlDirectory:
    """The control files, over the services of a running daemon."""

    def __init__(self, services: Services) -> None:
        self._services = services
        reads, writes = self._reads(), self._writes()
        # a file without a handler for reading fails here, at the start of the daemon, and not when somebody reads it
        self.attributes = tuple(Attribute(file, reads[file.name], writes.get(file.name)) for file in FILES)

    def _reads(self) -> dict[str, Read]:
        s = self._services
        limits, tmem, pressure = s.limits, s.engine.tmem, s.pressure
        budget = s.engine.cleaner.budget
        return {
            "pool.max": _number(lambda: limits.pool.max),
            "pool.high": _number(lambda: limits.pool.high),
            "pool.low": _number(lambda: limits.pool.low),
            # pool.current is polled while a shrink is shown: one figure does not take a snapshot of all
            "pool.current": _number(lambda: tmem.pool_bytes),
            "pool.peak": _number(lambda: tmem.arena.peak * SEGMENT_BYTES),
            "backing.current": _number(lambda: tmem.extents.held_bytes),
            "backing.max": _number(lambda: limits.backing),
            "shrink": lambda: report.shrink_answer(s),
            "compact": lambda: report.compact_answer(s),
            "clean.rate": _number(lambda: int(budget.rate)),
            "clean.daily": lambda: _limit(budget.daily),
            "recompress": lambda: _recompress_choices(s.engine.recompressor.level),
            "codec": lambda: _bracketed(CHOICES, s.engine.pager.codec.name),
            "pressure.mode": lambda: _bracketed(MODES, pressure.mode),
            "pressure.reserve": _number(lambda: pressure.settings.reserve_bytes),
            "pressure.growth": _number(lambda: pressure.settings.growth_bytes),
            "kernel.tuning": lambda: _bracketed(TUNING_MODES, pressure.tuning.mode),
            "state": lambda: f"{s.state()}\nsignals: {', '.join(pressure.signals.live)}\n",
            "damage": lambda: report.damage(s),
            "stat": lambda: report.flat_keyed(s, "stat"),
            "events": lambda: report.flat_keyed(s, "events"),
            "mm_stat": lambda: report.zram(s, "mm_stat"),
            "io_stat": lambda: report.zram(s, "io_stat"),
            "bd_stat": lambda: report.zram(s, "bd_stat"),
            "metrics": lambda: report.prometheus(s),
            "segments": lambda: report.segments(s),
        }

    def _writes(self) -> dict[str, Write]:
        return {
            "pool.max": self._services.limits.set_pool_max,
            "pool.high": self._pool_high,
            "pool.low": self._pool_low,
            "backing.max": self._backing_max,
            "shrink": self._shrink,
            "compact": self._compact,
            "clean.rate": self._clean_rate,
            "clean.daily": self._clean_daily,
            "recompress": self._recompress,
            "codec": self._codec,
            "pressure.mode": self._pressure_mode,
            "pressure.reserve": self._pressure_reserve,
            "pressure.growth": self._pressure_growth,
            "kernel.tuning": self._kernel_tuning,
            "damage": self._damage,
        }

    async def _pool_high(self, text: str) -> None:
        self._services.limits.set_pool_high(text)

    async def _pool_low(self, text: str) -> None:
        self._services.limits.set_pool_low(text)

    async def _backing_max(self, text: str) -> None:
        self._services.limits.set_backing_max(text)

    async def _codec(self, text: str) -> None:
        self._services.engine.pager.set_codec(parse_codec(text))

    async def _recompress(self, text: str) -> None:
        self._services.engine.recompressor.set_level(parse_recompress(text))

    async def _pressure_mode(self, text: str) -> None:
        self._services.pressure.set_mode(parse_mode(text))

    async def _pressure_reserve(self, text: str) -> None:
        self._services.pressure.set_reserve(parse_size(text, self._services.pressure.signals.memory_bytes))

    async def _pressure_growth(self, text: str) -> None:
        self._services.pressure.set_growth(parse_size(text))

    async def _kernel_tuning(self, text: str) -> None:
        await self._services.pressure.tuning.set_mode(parse_tuning(text))

    async def _damage(self, text: str) -> None:
        if text.strip() != ACKNOWLEDGE:
            raise BadValue(f"{text.strip()!r} does nothing to damage: write {ACKNOWLEDGE!r} once it was looked into")
        self._services.engine.tmem.damage.acknowledge()

    async def _shrink(self, text: str) -> None:
        answer = await self._services.engine.shrinker.shrink(ShrinkRequest.parse(text))
        if answer.reason is not None:  # what was freed stays freed: the error says only that it is less than asked for
            raise FellShort(f"freed {answer.freed} of {text.strip()}: {answer.reason}")

    async def _compact(self, text: str) -> None:
        answer = await self._services.engine.cleaner.compact(CompactRequest.parse(text))
        if answer.reason is not None:
            raise FellShort(f"space amplification is {answer.after:.3f}, not {answer.requested:.2f}: {answer.reason}")

    async def _clean_rate(self, text: str) -> None:
        rate = parse_size(text)
        if not rate:  # a merge waits for its bytes at this rate: at none, for ever
            raise OutOfRange("cleaning at 0 bytes per second never ends: write 0 to clean.daily to stop it")
        self._services.engine.cleaner.set_budget(rate=rate)

    async def _clean_daily(self, text: str) -> None:
        daily = math.inf if text.strip().lower() == "max" else parse_size(text)
        self._services.engine.cleaner.set_budget(daily=daily)


def _limit(value: float) -> str:
    return "max\n" if math.isinf(value) else f"{value:.0f}\n"


def _number(value: Callable[[], int]) -> Read:
    return lambda: f"{value()}\n"


def _bracketed(choices: tuple[str, ...], current: str) -> str:
    # a level is no choice of its own: zstd:3 stands where zstd does
    family = current.partition(":")[0]
    return " ".join(f"[{current}]" if name == family else name for name in choices) + "\n"


def _recompress_choices(level: int | None) -> str:
    return _bracketed(("off", "zstd"), "off" if level is None else f"zstd:{level}")
