"""The control directory as one table: name, unit, meaning and mode of every file.

Needs no daemon: docs/control.md is made from it, and the command knows from it which files hold one value. control.py gives each
file its handlers. A setting holds one value, with a newline at the end; reports have forms of their own. Names follow cgroup v2
where it has one, zram otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_CHOICE: Final = "Read: the choice in [brackets]."
_REQUEST: Final = (
    "returns when done, EAGAIN if it fell short. A signal to the writer ends it. Read: the last answer, also of one that was ended."
)
#: What is written to `damage`.
ACKNOWLEDGE: Final = "acknowledge"


@dataclass(frozen=True, slots=True)
class ControlFile:
    """One file. Everybody may read a file that is not private. A document has more than one line of values.

    What is written to a setting is set again when the worker is replaced.
    """

    name: str
    unit: str
    help: str
    is_writable: bool = False
    is_private: bool = False
    is_document: bool = False
    is_setting: bool = False

    @property
    def mode(self) -> int:
        """Permission bits."""
        return (0o400 if self.is_private else 0o444) | (0o200 if self.is_writable else 0)


def _value(name: str, unit: str, meaning: str) -> ControlFile:
    return ControlFile(name, unit, meaning)


def _setting(name: str, unit: str, meaning: str) -> ControlFile:
    return ControlFile(name, unit, meaning, is_writable=True, is_setting=True)


def _request(name: str, meaning: str) -> ControlFile:
    return ControlFile(name, "-", meaning, is_writable=True, is_document=True)


def _fields(name: str, meaning: str) -> ControlFile:
    return ControlFile(name, "zram", meaning)


def _document(name: str, form: str, meaning: str, is_private: bool = False) -> ControlFile:
    return ControlFile(name, form, meaning, is_private=is_private, is_document=True)


#: In the order of the documentation and of the directory.
FILES: Final = (
    _setting("pool.max", "bytes", "Hard limit of pool RAM. Write bytes, K/M/G/T, N% of RAM, or max, and 10M at least; "
        "a lower limit is reached before the write returns, or EBUSY."),
    _setting("pool.high", "bytes", "Shrinking in the background starts above it. Write bytes, K/M/G/T, N% of RAM, or "
        "max, which stands for 90% of pool.max and follows it."),
    _setting("pool.low", "bytes", "Shrinking in the background stops there. Write bytes, K/M/G/T, N% of RAM, or "
        "max, which stands for 80% of pool.max and follows it."),
    _value("pool.current", "bytes", "RAM that the pool holds: whole frames, ready ones included."),
    _value("pool.peak", "bytes", "The most RAM that the pool ever held."),
    _setting("backing.max", "bytes", "Limit of disk use. Write bytes, K/M/G/T, max, or N% of what was free at the start "
        "(a device: of its size)."),
    _value("backing.current", "bytes", "Disk in use by segments."),
    _request("shrink", f"Write bytes, K/M/G/T, '64M deadline=2s' or 'all' to free that much pool RAM; {_REQUEST}"),
    _request("compact", "Write a space amplification (nothing: 1.10), or '1.05 deadline=10s', to merge in RAM and clean "
        f"the backing until that is reached; {_REQUEST}"),
    _setting("clean.rate", "bytes/s", "What cleaning in the background may write: bytes or K/M/G/T."),
    _setting("clean.daily", "bytes", "What cleaning may write in 24 hours: bytes, K/M/G/T or max. "
        "What is left of today is cleaner_budget_left in stat."),
    _setting("writeahead", "%", "Percent of the pool that is written to the backing before its memory is wanted, so that "
        "it can be had without I/O: 0 (none) to 90."),
    _setting("writeahead.rest", "s", "For how long a segment rests before it is written so: what dies young is not written. "
        "Write seconds, with s or m where wanted."),
    _setting("recompress", "-", "Encode idle pages in RAM again, in the background, with zstd and a dictionary made of such pages, "
        f"where that saves a tenth: off, zstd (level 3), zstd:1 to zstd:19. {_CHOICE}"),
    _setting("codec", "-", "How pages are compressed that are stored from now on: lz4, zstd, zstd:1 to zstd:19, none. "
        "Read: the choices, the current one in [brackets]."),
    _setting("pressure.mode", "-", "auto: the pool follows the memory that is available (docs/operations.md has the rules); "
        f"manual: limits, watermarks and shrink alone move it; off: the signals of memory pressure are not read. {_CHOICE}"),
    _setting("pressure.reserve", "bytes", "Headroom to leave to others: the pool stops growing when headroom is below twice "
        "this, and shrinks when it is below this. Write bytes, K/M/G/T, or N% of RAM."),
    _setting("pressure.growth", "bytes/s", "How fast the pool may grow back when memory is available again: bytes, K/M/G/T."),
    _setting("kernel.tuning", "-", "auto: while the image is an active swap, vm.watermark_boost_factor is 0, and while memory "
        "is short vm.min_free_kbytes and the priority of kworkers may change; off: they are restored at once, and none "
        f"is changed. {_CHOICE}"),
    _setting("latency", "-", "auto: idle CPUs are kept awake while pages are swapped in bursts; off: never; always: until it is "
        f"changed, or EACCES where that is not possible. {_CHOICE}"),
    _setting("watchdog", "s", "A worker that answers no request for so long, though requests wait, is killed and replaced, "
        "unless it waits for the backing. Write seconds (2 at least), with s or m where wanted, or off."),
    _value("state", "-", "First line: running, degraded: WHY, or draining. Second: the signals of memory pressure that are live."),
    ControlFile("damage", "flat keyed", "Damaged records that loads found in RAM and on disk, and reads of the backing that "
        "failed, as far as nobody has acknowledged them. Write acknowledge to have them no longer in state; the counters in events "
        "go on.",
        is_writable=True, is_document=True),
    _document("stat", "flat keyed", "Everything that is counted: see below."),
    _document("events", "flat keyed", "How often something noteworthy happened: see below."),
    _fields("mm_stat", "Memory, as zram: see below."),
    _fields("io_stat", "Failures, as zram: see below."),
    _fields("bd_stat", "The backing, as zram: see below."),
    _document("metrics", "Prometheus", "The numbers of stat and events as Prometheus text: see below."),
    _document("segments", "lines", "One line per segment, oldest first: segment, state, lane, sequence, fill and live in percent "
        "of 1 MiB, pages. Only root may read it.", is_private=True),
)  # fmt: skip
