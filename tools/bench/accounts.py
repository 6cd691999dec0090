"""The costs of a swap other than time: CPU of daemon, kernel threads and faulting processes; requests and bytes at the disk.

Idle CPUs that poll instead of halting are counted, too: the residency of cpuidle's state 0, if that state polls.

Counters are read before and after, and subtracted. CPU time comes from /proc/PID/task/*/schedstat in nanoseconds, or where the
kernel does not have that, from /proc/PID/stat in ticks of about 4 ms. Kernel threads are the children of kthreadd. Kworkers carry
out the requests of loop, so the CPU of all kworkers is given next to that of the daemon. It includes other work of theirs, and does
not include kworkers that ended meanwhile. Disk requests are the disk's own count (/proc/diskstats), swapped pages the kernel's
(/proc/vmstat). The parsers are pure.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_CPUS: Final = Path("/sys/devices/system/cpu")
_KTHREADD: Final = 2
_SECTOR_BYTES: Final = 512
_TICKS: Final = os.sysconf("SC_CLK_TCK")
#: The figures of `Usage.wear`.
WEAR: Final = "written_bytes_per_page_out"
OWN_WEAR: Final = "own_written_bytes_per_page_out"
#: The counter of a swap that says what it wrote to the disk.
OWN_WRITTEN: Final = "bytes_written"
_VMSTAT: Final = ("pswpin", "pswpout", "zswpin", "zswpout", "zswpwb")


@dataclass(frozen=True, slots=True)
class DiskCounters:
    """Completed requests of a disk and their bytes."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Both ways."""
        return self.read_bytes + self.written_bytes

    def since(self, before: DiskCounters) -> DiskCounters:
        """What was done since `before`."""
        return DiskCounters(
            self.reads - before.reads,
            self.read_bytes - before.read_bytes,
            self.writes - before.writes,
            self.written_bytes - before.written_bytes,
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """Seconds of CPU, requests and bytes at the disk, pages swapped: since boot, or between two moments."""

    wall_s: float
    daemon_s: float
    kworkers_s: float
    kswapd_s: float
    process_s: float
    disk: DiskCounters
    swapped: Mapping[str, int]
    polled_s: float = 0.0
    #: Each kworker's, by its number.
    each_kworker_s: Mapping[int, float] = field(default_factory=dict)
    #: What the swap itself wrote to the disk, by its own count.
    own_written_bytes: int = 0

    def since(self, before: Usage) -> Usage:
        """What was used since `before`."""
        return Usage(
            self.wall_s - before.wall_s,
            self.daemon_s - before.daemon_s,
            sum(_grown(before.each_kworker_s.get(pid, 0.0), seconds) for pid, seconds in self.each_kworker_s.items()),
            self.kswapd_s - before.kswapd_s,
            self.process_s - before.process_s,
            self.disk.since(before.disk),
            {key: value - before.swapped.get(key, 0) for key, value in self.swapped.items()},
            polled_s=self.polled_s - before.polled_s,
            own_written_bytes=self.own_written_bytes - before.own_written_bytes,
        )

    @property
    def pages_out(self) -> int:
        """Pages swapped out, to the device or into zswap, without those that zswap wrote back later."""
        return self.swapped.get("pswpout", 0) + self.swapped.get("zswpout", 0) - self.swapped.get("zswpwb", 0)

    @property
    def wear(self) -> dict[str, float]:
        """Bytes written per page swapped out, by the disk's count and by the swap's own; nothing if no page was.

        The disk's count includes what other programs write.
        """
        written = {WEAR: self.disk.written_bytes, OWN_WEAR: self.own_written_bytes}
        return {name: count / self.pages_out for name, count in written.items()} if self.pages_out else {}

    @property
    def pages_in(self) -> int:
        """Pages swapped in, from the device or from zswap."""
        return self.swapped.get("pswpin", 0) + self.swapped.get("zswpin", 0)


@dataclass(frozen=True, slots=True)
class Meter:
    """Reads the counters of the daemon's processes, of the faulting processes, of one disk ('254:0'), and of the swap itself."""

    daemons: tuple[int, ...]
    processes: tuple[int, ...]
    disk: str
    counters: Callable[[], Mapping[str, int]] = dict

    def now(self) -> Usage:
        """All counters of this moment."""
        # first, since a daemon may take a while: what is measured begins after it
        own = self.counters().get(OWN_WRITTEN, 0)
        threads = list(_kernel_threads(place.name for place in _PROC.iterdir()))
        kworkers = {pid: seconds for pid, name, seconds in threads if name.startswith("kworker")}
        return Usage(
            time.monotonic(),
            sum(map(cpu_s, self.daemons)),
            sum(kworkers.values()),
            sum(seconds for _, name, seconds in threads if name.startswith("kswapd")),
            sum(map(cpu_s, self.processes)),
            parse_diskstats((_PROC / "diskstats").read_text(), self.disk),
            {key: value for key, value in parse_flat((_PROC / "vmstat").read_text()).items() if key in _VMSTAT},
            polled_s(),
            kworkers,
            own,
        )


def parse_diskstats(text: str, device: str) -> DiskCounters:
    """Counters of 'MAJOR:MINOR' in /proc/diskstats; zeros if it is missing (Documentation/admin-guide/iostats.rst)."""
    major, minor = device.split(":")
    for line in text.splitlines():
        fields = line.split()
        if fields[:2] == [major, minor]:
            reads, _, sectors_read, _, writes, _, sectors_written = map(int, fields[3:10])
            return DiskCounters(reads, sectors_read * _SECTOR_BYTES, writes, sectors_written * _SECTOR_BYTES)
    return DiskCounters()


def parse_flat(text: str) -> dict[str, int]:
    """The `key value` lines whose value is a number."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def parse_stat_cpu_s(text: str, ticks: int = _TICKS) -> float:
    """User and system time in /proc/PID/stat; the name may contain anything, brackets and spaces too."""
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / ticks


def parse_stat_parent(text: str) -> int:
    """The parent in /proc/PID/stat."""
    return int(text.rpartition(")")[2].split()[1])


def parse_stat_name(text: str) -> str:
    """The name in /proc/PID/stat."""
    return text.partition("(")[2].rpartition(")")[0]


def parse_status_bytes(text: str, key: str) -> int:
    """The memory named `key` in /proc/PID/status; 0 if it is missing."""
    found = (line.split() for line in text.splitlines() if line.startswith(f"{key}:"))
    return next((int(words[1]) << 10 for words in found), 0)


def parse_mm_stat(text: str) -> dict[str, int]:
    """The fields of zram's mm_stat that are compared (Documentation/admin-guide/blockdev/zram.rst)."""
    names = ("original_bytes", "compressed_bytes", "ram_bytes", "ram_limit", "ram_peak", "same_pages", "compacted", "huge_pages")
    return dict(zip(names, map(int, text.split()), strict=False))


def cpu_s(pid: int) -> float:
    """CPU time of all threads of `pid` so far; 0 if it has ended."""
    with suppress(OSError):
        return sum(_thread_cpu_s(thread) for thread in (_PROC / str(pid) / "task").iterdir())
    return 0.0


def polled_s(cpus: Path = _CPUS) -> float:
    """For how long idle CPUs have polled so far, added up; 0 where the kernel does not say."""
    states = [state for state in cpus.glob("cpu[0-9]*/cpuidle/state0") if (state / "name").read_text() == "POLL\n"]
    return sum(int((state / "time").read_text()) for state in states) / 1e6


def disk_of(path: Path) -> str:
    """'MAJOR:MINOR' of the disk that holds `path`."""
    device = path.stat().st_dev
    return f"{os.major(device)}:{os.minor(device)}"


def _grown(before: float, now: float) -> float:
    """How much a counter has grown; one that is smaller than before belongs to another process."""
    return now - before if now >= before else now


def _thread_cpu_s(place: Path) -> float:
    with suppress(OSError):
        return int((place / "schedstat").read_text().split()[0]) / 1e9
    with suppress(OSError):
        return parse_stat_cpu_s((place / "stat").read_text())
    return 0.0


def _kernel_threads(pids: Iterable[str]) -> Iterator[tuple[int, str, float]]:
    """Number, name and CPU time of those of `pids` that are kernel threads."""
    for pid in pids:
        if pid.isdigit():
            with suppress(OSError, IndexError):
                stat = (_PROC / pid / "stat").read_text()
                if parse_stat_parent(stat) == _KTHREADD:
                    yield int(pid), parse_stat_name(stat), _thread_cpu_s(_PROC / pid)
