"""The control directory of a running daemon: a handler for reading, and one for writing, of each file in control_files.FILES.

Served by the file system (fuse/namespace.py), read and written through it by the command. A written value takes effect at once or
fails: EINVAL (not a value of this kind), ERANGE (cannot be honoured), EBUSY (not now), EAGAIN (a shrink fell short).

Settings are kept once they are accepted, and set again by the next worker (system/kept_settings.py).

Knows the engine through `Services`; knows nothing of FUSE.

Invariant: 1. A file that the table calls writable has a handler for writing, and no other file has one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio

from tmemfs.control_files import ACKNOWLEDGE, FILES, ControlFile
from tmemfs.errors import BadValue, FellShort, OutOfRange
from tmemfs.jobs.compact_request import CompactRequest
from tmemfs.jobs.kernel_tuning import MODES as TUNING_MODES
from tmemfs.jobs.kernel_tuning import parse_tuning
from tmemfs.jobs.latency import MODES as LATENCY_MODES
from tmemfs.jobs.latency import parse_latency
from tmemfs.jobs.pressure import MODES, parse_mode
from tmemfs.jobs.pulse import parse_watchdog
from tmemfs.jobs.recompressor import parse_recompress
from tmemfs.jobs.shrink_request import ShrinkRequest
from tmemfs.jobs.write_ahead import parse_rest, parse_writeahead
from tmemfs.observe import report
from tmemfs.services import Services
from tmemfs.store.codec import CHOICES, parse_codec
from tmemfs.system.kept_settings import KeptSettings
from tmemfs.units import SEGMENT_BYTES, parse_size

log = logging.getLogger(__name__)

#: A worker serves only after that: a setting must not keep the swap waiting.
_LONGEST_S: Final = 2.0

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
    """The control files, over the services of a running daemon. Without `kept`, settings end with this process."""

    def __init__(self, services: Services, kept: KeptSettings | None = None) -> None:
        self._services = services
        self._kept = kept
        self._setters = self._writes()
        reads = self._reads()
        # a file without a handler for reading fails here, at the start of the daemon, and not when somebody reads it
        self.attributes = tuple(Attribute(file, reads[file.name], self._write_of(file)) for file in FILES)

    async def set_again(self) -> None:
        """Set what users have set while earlier workers served. What cannot be set is logged."""
        left = self._kept.all() if self._kept else {}
        # Twice: a limit may be refused until another one is set.
        for log_failure in (_ignore, _log_failure):
            left = {name: text for name, text in left.items() if not await self._is_set(name, text, log_failure)}

    async def _is_set(self, name: str, text: str, failed: Callable[[str, str, object], None]) -> bool:
        try:
            with trio.move_on_after(_LONGEST_S) as limit:
                await self._setters[name](text)
        except Exception as error:  # whatever fails, the mount is to be served
            failed(name, text, error)
            return False
        if limit.cancelled_caught:
            failed(name, text, "it takes too long")
        return not limit.cancelled_caught

    def _write_of(self, file: ControlFile) -> Write | None:
        """The handler for writing to `file`, which keeps what it has accepted if that is a setting."""
        write, kept = self._setters.get(file.name), self._kept
        if write is None or kept is None or not file.is_setting:
            return write

        async def write_and_keep(text: str) -> None:
            await write(text)
            if not kept.keep(file.name, text.strip()):
                log.warning("%s: there is no space to keep %s for another worker", file.name, text.strip())

        return write_and_keep

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
            "writeahead": _number(lambda: s.engine.write_ahead.percent),
            "writeahead.rest": lambda: _seconds(s.engine.write_ahead.rest_s),
            "recompress": lambda: _recompress_choices(s.engine.recompressor.level),
            "codec": lambda: _bracketed(CHOICES, s.engine.pager.codec.name),
            "pressure.mode": lambda: _bracketed(MODES, pressure.mode),
            "pressure.reserve": _number(lambda: pressure.settings.reserve_bytes),
            "pressure.growth": _number(lambda: pressure.settings.growth_bytes),
            "kernel.tuning": lambda: _bracketed(TUNING_MODES, pressure.tuning.mode),
            "latency": lambda: _bracketed(LATENCY_MODES, s.latency.mode),
            "watchdog": lambda: _seconds_or_off(s.watchdog_s),
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
            "writeahead": self._writeahead,
            "writeahead.rest": self._writeahead_rest,
            "recompress": self._recompress,
            "codec": self._codec,
            "pressure.mode": self._pressure_mode,
            "pressure.reserve": self._pressure_reserve,
            "pressure.growth": self._pressure_growth,
            "kernel.tuning": self._kernel_tuning,
            "latency": self._latency,
            "damage": self._damage,
            "watchdog": self._watchdog,
        }

    async def _pool_high(self, text: str) -> None:
        self._services.limits.set_pool_high(text)

    async def _pool_low(self, text: str) -> None:
        self._services.limits.set_pool_low(text)

    async def _backing_max(self, text: str) -> None:
        self._services.limits.set_backing_max(text)

    async def _codec(self, text: str) -> None:
        self._services.engine.pager.set_codec(parse_codec(text))

    async def _writeahead(self, text: str) -> None:
        self._services.engine.write_ahead.set_percent(parse_writeahead(text))

    async def _writeahead_rest(self, text: str) -> None:
        self._services.engine.write_ahead.set_rest(parse_rest(text))

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

    async def _latency(self, text: str) -> None:
        self._services.latency.set_mode(parse_latency(text))

    async def _damage(self, text: str) -> None:
        if text.strip() != ACKNOWLEDGE:
            raise BadValue(f"{text.strip()!r} does nothing to damage: write {ACKNOWLEDGE!r} once it was looked into")
        self._services.engine.tmem.damage.acknowledge()

    async def _watchdog(self, text: str) -> None:
        self._services.set_watchdog(parse_watchdog(text))

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


def _seconds_or_off(seconds: float) -> str:
    return f"{seconds:g}\n" if seconds else "off\n"


def _seconds(seconds: float) -> str:
    return f"{seconds:g}\n"


def _limit(value: float) -> str:
    return "max\n" if math.isinf(value) else f"{value:.0f}\n"


def _ignore(name: str, text: str, why: object) -> None:
    pass


def _log_failure(name: str, text: str, why: object) -> None:
    log.error("%s was %s before the worker was replaced, and cannot be that again: %s", name, text, why)


def _number(value: Callable[[], int]) -> Read:
    return lambda: f"{value()}\n"


def _bracketed(choices: tuple[str, ...], current: str) -> str:
    # a level is no choice of its own: zstd:3 stands where zstd does
    family = current.partition(":")[0]
    return " ".join(f"[{current}]" if name == family else name for name in choices) + "\n"


def _recompress_choices(level: int | None) -> str:
    return _bracketed(("off", "zstd"), "off" if level is None else f"zstd:{level}")
