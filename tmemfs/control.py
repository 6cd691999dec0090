"""The control directory as one table: name, type, unit, mode, read, write.

Served by the file system (fuse/namespace.py), read and written through it by the command, and printed as docs/control.md by
`python -m tmemfs.control`. One value per file, newline at the end; a written value takes effect at once or fails: EINVAL (not a
value of this kind), ERANGE (cannot be honoured), EBUSY (not now), EAGAIN (a shrink fell short). Names follow cgroup v2 where it
has one, zram otherwise.

Knows the engine through `Services`; knows nothing of FUSE.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tmemfs.errors import FellShort, OutOfRange
from tmemfs.jobs.compaction import CompactRequest
from tmemfs.jobs.kernel_tuning import MODES as TUNING_MODES
from tmemfs.jobs.kernel_tuning import parse_tuning
from tmemfs.jobs.pressure import MODES, parse_mode
from tmemfs.jobs.recompressor import parse_recompress
from tmemfs.jobs.services import Services
from tmemfs.jobs.shrinker import ShrinkRequest
from tmemfs.observe.report import Values, bd_stat, compact_answer, events, io_stat, metrics, mm_stat, segments, shrink_answer, stat
from tmemfs.store.codec import CHOICES, parse_codec
from tmemfs.units import SEGMENT_BYTES, parse_size

Read = Callable[[], str]
Write = Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Attribute:
    """One file of the control directory. `read` gives its text with the newline; `write` takes a value, or raises.

    Everybody may read a file that is not `private`.
    """

    name: str
    unit: str
    help: str
    read: Read | None = None
    write: Write | None = None
    private: bool = False

    @property
    def mode(self) -> int:
        """Permission bits."""
        return ((0o400 if self.private else 0o444) if self.read else 0) | (0o200 if self.write else 0)


class Control:
    """The table, over the services of a running daemon."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.attributes: tuple[Attribute, ...] = self._table()

    def _table(self) -> tuple[Attribute, ...]:
        s = self._services
        marks = s.limits
        pool = lambda: s.engine.tmem.pool_bytes  # noqa: E731
        return (
            Attribute("pool.max", "bytes", "Hard limit of pool RAM. Write bytes, K/M/G/T, N% of RAM, or max; "
                "a lower limit is reached before the write returns, or EBUSY.", _number(lambda: marks.pool.max), self._pool_max),
            Attribute("pool.high", "bytes", "Shrinking in the background starts above it. Bytes, K/M/G/T, N% of RAM; "
                "'max': 90% of pool.max.",
                _number(lambda: marks.pool.high), self._pool_high),
            Attribute("pool.low", "bytes", "Shrinking in the background stops there. Bytes, K/M/G/T, N% of RAM; "
                "'max': 80% of pool.max.",
                _number(lambda: marks.pool.low), self._pool_low),
            Attribute("pool.current", "bytes", "RAM the pool holds: whole frames, the reserve included.", _number(pool)),
            Attribute("pool.peak", "bytes", "The most RAM the pool ever held.",
                _number(lambda: s.engine.tmem.arena.peak * SEGMENT_BYTES)),
            Attribute("backing.max", "bytes", "Limit of disk use. Write bytes, K/M/G/T, max, or N% of what was free at the start "
                "(a device: of its size).",
                _number(lambda: marks.backing), self._backing_max),
            Attribute("backing.current", "bytes", "Disk in use by segments.", _number(lambda: s.engine.tmem.extents.held_bytes)),
            Attribute("shrink", "-", "Write bytes, K/M/G/T, '64M deadline=2s' or 'all' to free that much pool RAM; "
                "returns when done, EAGAIN if it fell short. A signal to the writer ends it. "
                "Read: the last answer, also of one that was ended.",
                lambda: shrink_answer(s), self._shrink),
            Attribute("compact", "-", "Write an amplification (nothing: 1.10), or '1.05 deadline=10s', to merge in RAM and "
                "clean the backing until that is reached; returns when done, EAGAIN if it fell short. A signal to the writer "
                "ends it. Read: the last answer, also of one that was ended.",
                lambda: compact_answer(s), self._compact),
            Attribute("clean.rate", "bytes/s", "What cleaning in the background may write: bytes or K/M/G/T.",
                _number(lambda: int(s.engine.cleaner.budget.rate)), self._clean_rate),
            Attribute("clean.daily", "bytes", "What cleaning may write in 24 hours: bytes, K/M/G/T or max. "
                "What is left of today is cleaner_budget_left in stat.",
                lambda: _limit(s.engine.cleaner.budget.daily), self._clean_daily),
            Attribute("recompress", "-", "Encode idle pages in RAM anew, in the background, with zstd and a dictionary made of "
                "such pages, where that saves a tenth: off, zstd (level 3), zstd:1 to zstd:19. Read: the choice in [brackets].",
                lambda: _recompress_choices(s.engine.recompressor.level), self._recompress),
            Attribute("codec", "-", "How pages stored from now on are compressed: lz4, zstd, zstd:1 to zstd:19, none. "
                "Read: the choices, the current one in [brackets].",
                lambda: _choices(s.engine.pager.codec.name), self._codec),
            Attribute("pressure.mode", "-", "auto: the pool follows the memory there is (docs/operations.md has the law); "
                "manual: it moves by limits, watermarks and shrink; off: no signal is looked at. Read: the choice in [brackets].",
                lambda: _bracketed(MODES, s.pressure.mode), self._pressure_mode),
            Attribute("pressure.reserve", "bytes", "Memory to leave to others: below twice that the pool holds, below that it "
                "shrinks. Bytes, K/M/G/T, or N% of RAM.",
                _number(lambda: s.pressure.settings.reserve_bytes), self._pressure_reserve),
            Attribute("pressure.growth", "bytes/s", "What the pool may grow by when there is memory again: bytes, K/M/G/T.",
                _number(lambda: s.pressure.settings.growth_bytes), self._pressure_growth),
            Attribute("kernel.tuning", "-", "auto: while the image is a swap that is on, vm.watermark_boost_factor is 0, and while "
                "memory is short vm.min_free_kbytes and the priority of the kernel's workers may change; off: restored at once, "
                "and nothing is changed. Read: the choice in [brackets].",
                lambda: _bracketed(TUNING_MODES, s.pressure.tuning.mode), self._kernel_tuning),
            Attribute("state", "-", "First line: running, degraded: WHY, or draining. Second: the signals of memory pressure "
                "that are live.",
                lambda: f"{s.state()}\nsignals: {', '.join(s.pressure.signals.live)}\n"),
            Attribute("stat", "flat keyed", "Everything that is counted.", lambda: _flat(stat(s))),
            Attribute("events", "flat keyed", "How often something noteworthy happened.", lambda: _flat(events(s))),
            Attribute("mm_stat", "zram", "orig_data_size compr_data_size mem_used_total mem_limit mem_used_max same_pages "
                "pages_compacted huge_pages huge_pages_since, as zram; sizes include pages on disk.", lambda: mm_stat(s)),
            Attribute("io_stat", "zram", "failed_reads failed_writes invalid_io notify_free, as zram.", lambda: io_stat(s)),
            Attribute("bd_stat", "zram", "bd_count bd_reads bd_writes, as zram, in units of 4 KiB.", lambda: bd_stat(s)),
            Attribute("metrics", "Prometheus", "The numbers of stat and events as Prometheus text.", lambda: metrics(s)),
            Attribute("segments", "lines", "One line per segment, oldest first: segment state lane sequence fill live pages. "
                "Only root may read it.",
                lambda: segments(s), private=True),
        )  # fmt: skip

    async def _pool_max(self, text: str) -> None:
        await self._services.limits.set_pool_max(text)

    async def _pool_high(self, text: str) -> None:
        self._services.limits.set_pool_high(text)

    async def _pool_low(self, text: str) -> None:
        self._services.limits.set_pool_low(text)

    async def _backing_max(self, text: str) -> None:
        self._services.limits.set_backing_max(text)

    async def _codec(self, text: str) -> None:
        self._services.engine.pager.codec = parse_codec(text)

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

    async def _shrink(self, text: str) -> None:
        answer = await self._services.engine.shrinker.shrink(ShrinkRequest.parse(text))
        if answer.reason is not None:
            raise FellShort(f"freed {answer.freed} of {text.strip()}: {answer.reason}")

    async def _compact(self, text: str) -> None:
        answer = await self._services.engine.cleaner.compact(CompactRequest.parse(text))
        if answer.reason is not None:
            raise FellShort(f"amplification is {answer.after:.3f}, not {answer.requested:.2f}: {answer.reason}")

    async def _clean_rate(self, text: str) -> None:
        rate = parse_size(text)
        if not rate:
            raise OutOfRange("cleaning at 0 bytes a second never ends: write clean.daily=0 to stop it")
        self._services.engine.cleaner.set_budget(rate=rate)

    async def _clean_daily(self, text: str) -> None:
        daily = math.inf if text.strip().lower() == "max" else parse_size(text)
        self._services.engine.cleaner.set_budget(daily=daily)


def _limit(value: float) -> str:
    return "max\n" if math.isinf(value) else f"{value:.0f}\n"


def _number(value: Callable[[], int]) -> Read:
    return lambda: f"{value()}\n"


def _flat(values: Values) -> str:
    return "".join(f"{key} {value:.3f}\n" if isinstance(value, float) else f"{key} {value}\n" for key, value in values.items())


def _choices(current: str) -> str:
    return _bracketed(CHOICES, current)


def _bracketed(choices: tuple[str, ...], current: str) -> str:
    family = current.partition(":")[0]
    return " ".join(f"[{current}]" if name == family else name for name in choices) + "\n"


def _recompress_choices(level: int | None) -> str:
    return _bracketed(("off", "zstd"), "off" if level is None else f"zstd:{level}")


def document() -> str:
    """docs/control.md."""
    lines = [
        "# The control directory",
        "",
        "Made from the table in `tmemfs/control.py` by `make docs`; do not edit. One value per file, newline at the end.",
        "",
        "| file | mode | unit | meaning |",
        "|---|---|---|---|",
    ]
    table = Control(Services.placeholder()).attributes
    return "\n".join([*lines, *(f"| `{a.name}` | {a.mode:04o} | {a.unit} | {a.help} |" for a in table)]) + "\n"


if __name__ == "__main__":
    print(document(), end="")
