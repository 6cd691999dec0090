"""The state of the guest while a scenario runs: samples, kept in memory and written to a file afterwards.

The kernel's counters and the contender's have a thread each: a daemon that is slow to answer must not hide what the machine does.
The process that starts a watch has locked its memory and is exempt from the OOM killer (guest.py).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from tools.vm.contenders import Contender, swap_device
from tools.vm.evidence import Sample, meminfo, numbers

_KERNEL_S: Final = 0.1
_POOL_S: Final = 0.1
_TOLD_S: Final = 5.0
_FIELDS: Final = ("MemFree", "MemAvailable", "SwapFree", "SwapCached", "Mlocked", "Unevictable", "AnonPages", "Shmem", "Cached",
                  "Active(anon)", "Inactive(anon)",
                  "Writeback", "SUnreclaim", "SReclaimable", "PageTables")  # fmt: skip
SWAPPED: Final = ("pswpin", "pswpout", "zswpin", "zswpout")
_COUNTERS: Final = (*SWAPPED, "pgscan_kswapd", "pgscan_direct", "allocstall_normal", "allocstall_dma32", "oom_kill")

Row = dict[str, float]


class Watch:
    """Takes samples from enter to exit. `say` gets a line now and then."""

    def __init__(self, contender: Contender, say: Callable[[str], None]) -> None:
        self._contender = contender
        self._say = say
        self._end = threading.Event()
        self._device = device_stat(swap_device())
        self.rows: list[Row] = []
        self.pool: list[Sample] = []
        tasks = ((self._sample_kernel, _KERNEL_S), (self._sample_pool, _POOL_S), (self._tell, _TOLD_S))
        self._threads = [threading.Thread(target=self._run, args=task, daemon=True) for task in tasks]

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(30)

    def series(self, *keys: str) -> list[Sample]:
        """The sums of the figures of `keys`, over time."""
        return [Sample(row["at"], sum(row[key] for key in keys)) for row in list(self.rows)]

    def swapped(self) -> list[Sample]:
        """Pages swapped in and out, over time; zswap counts those that do not reach the swap by itself."""
        return self.series(*SWAPPED)

    def save(self, path: Path) -> None:
        """Write all samples as lines of JSON."""
        with path.open("w") as file:
            for row in self.rows:
                file.write(json.dumps(row) + "\n")
            for sample in self.pool:
                file.write(json.dumps({"at": sample.at, "pool": sample.value}) + "\n")

    def _run(self, work: Callable[[], None], every_s: float) -> None:
        while not self._end.wait(every_s):
            with suppress(OSError, KeyError, ValueError, IndexError):
                work()

    def _sample_kernel(self) -> None:
        counts, memory = numbers(Path("/proc/vmstat").read_text()), meminfo(Path("/proc/meminfo").read_text())
        row = {"at": time.monotonic(), **{key: counts.get(key, 0) for key in _COUNTERS}, **{key: memory[key] for key in _FIELDS}}
        row["completed"] = completed_requests(self._device) if self._device else sum(row[key] for key in SWAPPED)
        self.rows.append(row)

    def _sample_pool(self) -> None:
        pool = self._contender.pool_bytes()
        self.pool.append(Sample(time.monotonic(), pool))

    def _tell(self) -> None:
        row, pool = self.rows[-1], self.pool[-1].value if self.pool else 0
        sizes = f"free {row['MemFree'] / 1e6:.0f} available {row['MemAvailable'] / 1e6:.0f} locked {row['Mlocked'] / 1e6:.0f}"
        self._say(f"{sizes} pool {pool / 1e6:.0f} MB, swapped in {row['pswpin']} out {row['pswpout']}, killed {row['oom_kill']}")


def device_stat(path: str) -> Path | None:
    """The counters of the block device `path`; None if it is a file."""
    stat = Path("/sys/class/block") / Path(path).name / "stat"
    return stat if path.startswith("/dev/") and stat.exists() else None


def completed_requests(stat: Path) -> int:
    """Reads and writes that a device completed (Documentation/block/stat.rst)."""
    fields = stat.read_text().split()
    return int(fields[0]) + int(fields[4])
