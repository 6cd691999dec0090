"""What a disk really did during a part of a benchmark, by its own counters, and whether a limit held.

A thread reads the counters every SAMPLE_S. A limit held if in no span of SPAN_S or longer more was done than it allows, plus a
tolerance: the controller counts requests when they are issued, the disk when they are completed. The disk counts requests after
they were merged, so it never counts more of them than the controller.

Thread-safety: `samples` may be read once the watch has ended. Source: Documentation/admin-guide/iostats.rst.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from tools.bench.accounts import DiskCounters, parse_diskstats
from tools.bench.disk import DiskLimits, Rates

SAMPLE_S: Final = 0.25
#: Several of the slices of 0.1 s in which the controller gives out what a limit allows.
SPAN_S: Final = 2.0
#: At a limit of 125 MB/s 131 were seen from a swap file, at one of 3,000 requests 3,265: metadata passes the limits. What does not
#: hold at all is far from that: 403 MB/s of swap-outs (decision 23).
_TOLERANCE: Final = 0.2
_DISKSTATS: Final = Path("/proc/diskstats")

Moment = tuple[float, DiskCounters]


class DiskWatch:
    """Samples of the counters of one disk while the block runs."""

    def __init__(self, limits: DiskLimits) -> None:
        self._limits = limits
        self.samples: list[Moment] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="disk-watch", daemon=True)

    def __enter__(self) -> DiskWatch:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_over.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._is_over.wait(SAMPLE_S):
            self._limits.renew()
            self._sample()

    def _sample(self) -> None:
        self.samples.append((time.monotonic(), parse_diskstats(_DISKSTATS.read_text(), self._limits.disk)))


@dataclass(frozen=True, slots=True)
class Check:
    """What one contender made the disk do in one part, its highest rates, and what was more than the limits allow."""

    round: int
    contender: str
    part: str
    read_bytes: int
    written_bytes: int
    read_iops: float
    write_iops: float
    read_bps: float
    write_bps: float
    excess: str

    @classmethod
    def of(cls, number: int, contender: str, part: str, samples: Sequence[Moment], limits: Rates) -> Check:
        """The check of `samples`."""
        highest, all_of_it = highest_rates(samples), samples[-1][1].since(samples[0][1])
        return cls(
            number, contender, part, all_of_it.read_bytes, all_of_it.written_bytes, **highest, excess=excess(highest, limits)
        )

    @property
    def text(self) -> str:
        """In a line."""
        rates = (
            f"at most {self.read_bps / 1e6:.1f} MB/s and {self.read_iops:,.0f} requests/s read, "
            f"{self.write_bps / 1e6:.1f} MB/s and {self.write_iops:,.0f} requests/s written"
        )
        moved = f"{self.read_bytes / 1e6:,.0f} MB read, {self.written_bytes / 1e6:,.0f} MB written"
        return f"disk, {self.part} {self.contender}: {moved}; {rates}: {self.excess or 'within the limits'}"


def highest_rates(samples: Sequence[Moment]) -> dict[str, float]:
    """The highest rate of each kind over any span of SPAN_S, or over all samples if they span less."""
    found = dict.fromkeys(_RATES, 0.0)
    for took_s, done in _spans(samples):
        for name, count in _RATES.items():
            found[name] = max(found[name], count(done) / took_s)
    return found


def excess(rates: dict[str, float], limits: Rates) -> str:
    """What is more than `limits` allow, in words; empty if nothing is."""
    allowed = asdict(limits)
    over = [name for name, rate in rates.items() if allowed[name] and rate > allowed[name] * (1 + _TOLERANCE)]
    return ", ".join(f"{name} {rates[name]:,.0f} where the limit is {allowed[name]:,.0f}" for name in over)


def _spans(samples: Sequence[Moment]) -> Iterator[tuple[float, DiskCounters]]:
    """Length and counts of the shortest spans of SPAN_S or longer."""
    first, last = 0, len(samples) - 1
    for at, (now, done) in enumerate(samples):
        # the latest start that leaves the span long enough
        while first < at and now - samples[first + 1][0] >= SPAN_S:
            first += 1
        took_s = now - samples[first][0]
        if took_s >= SPAN_S or (at == last and not first and took_s > 0):
            yield took_s, done.since(samples[first][1])


_RATES: Final[dict[str, Callable[[DiskCounters], int]]] = {
    "read_iops": lambda done: done.reads,
    "write_iops": lambda done: done.writes,
    "read_bps": lambda done: done.read_bytes,
    "write_bps": lambda done: done.written_bytes,
}
