"""The workloads of the comparison, and their figures by name, for one contender in one round.

Latency is that of a swap-in alone: everything is paged out before (MADV_PAGEOUT, then the cgroup's swap cache is emptied), and no
more is touched than fits below the limit, so that no touch has to reclaim. The fill and the overcommitted working sets measure
reclaim. CPU is that of the daemon, of all kworkers (which carry out the requests to loop), and of the faulting process, in whose
context the kernel compresses for zram and zswap.

    fill        pages written past the limit of a cgroup, MB/s of what went out, until the last was written
    ram, disk   random touches, page-cluster 0 and 3        sequential   touches in order, page-cluster 3
    faults-N    random touches by N processes at once, page-cluster 0
    overcommit  a working set of several times the limit, touched uniformly or by zipf, a quarter of the touches writing. The pool
                may take POOL_SHARE of what the set compresses to, independent of the limit. Bytes at the disk are given by the
                disk's counters, which include other programs, and by the swap's own (or the kernel's, if it has none)
    wear-N      bytes written per page swapped out, in all of an overcommit
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tmemfs.units import MIB, PAGE_BYTES
from tools.bench.accounts import OWN_WRITTEN, Meter, Usage
from tools.bench.contenders import Swap
from tools.bench.statistics import percentile
from tools.bench.toucher import Answer, Herd, herd

Figures = dict[str, float]
PAGE_CLUSTER: Final = Path("/proc/sys/vm/page-cluster")
PROCESSES: Final = (1, 8)
_WRITE_PERCENT: Final = 25
POOL_SHARE: Final = 1 / 4
#: The share of the limit that can be touched without reclaim.
_OF_THE_LIMIT: Final = 0.6


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    limit_bytes: int
    set_bytes: int
    touches: int
    overcommit: tuple[float, ...]
    accesses: int

    @property
    def swap_bytes(self) -> int:
        """Four times what is swapped: the kernel keeps slots of clean pages until a swap is half full."""
        return 4 * self.set_bytes

    @property
    def fitting(self) -> int:
        """The number of touches that need no reclaim."""
        return min(self.touches, int(self.limit_bytes * _OF_THE_LIMIT) // PAGE_BYTES)


#: Accesses: a pool is written back from its upper to its lower watermark, 27 MB at a time where the limit is 240 MiB. In 40,000
#: accesses that happened once or twice, so the bytes at the disk differed by as much.
FULL: Final = Sizes(192 * MIB, 640 * MIB, 20_000, (1.5, 2.0, 3.0, 4.0), 120_000)
QUICK: Final = Sizes(96 * MIB, 256 * MIB, 8_000, (3.0,), 10_000)


def ample(swap: Swap, base: Path, sizes: Sizes, seed: int, sources: tuple[str, ...]) -> Iterator[tuple[str, Figures]]:
    """The workloads with as much RAM for the pool as it needs."""
    with herd(base, sizes.set_bytes // PAGE_BYTES, sizes.limit_bytes) as one:
        yield "fill", fill(swap, one, sizes)
        # first: later workloads leave the pages in another order in swap
        yield "sequential", faults(swap, one, sizes, seed, 3, "sequential")
        for source in sources:
            yield source, faults(swap, one, sizes, seed, 0, from_disk=source == "disk")
            yield f"{source}-readahead", faults(swap, one, sizes, seed, 3, from_disk=source == "disk")
    for processes in PROCESSES:
        with herd(base, sizes.set_bytes // PAGE_BYTES, sizes.limit_bytes, processes) as many:
            many.fill(0, many.members[0].count)
            yield f"faults-{processes}", faults(swap, many, sizes, seed, 0)


@dataclass(frozen=True, slots=True)
class Overcommit:
    """A working set of `times` the limit of its cgroup."""

    set_bytes: int
    times: float

    @classmethod
    def of(cls, pool_bytes: int, ratio: float, times: float) -> Overcommit:
        """The working set of which a pool of `pool_bytes` holds POOL_SHARE, compressed at `ratio`."""
        return cls(int(pool_bytes / POOL_SHARE * ratio) // PAGE_BYTES * PAGE_BYTES, times)

    @property
    def limit_bytes(self) -> int:
        """The limit of the cgroup."""
        return int(self.set_bytes / self.times) // PAGE_BYTES * PAGE_BYTES

    @property
    def swap_bytes(self) -> int:
        """See Sizes."""
        return 3 * self.set_bytes


def overcommitted(swap: Swap, base: Path, one: Overcommit, accesses: int, seed: int) -> Iterator[tuple[str, Figures]]:
    """Fill the working set, and touch it uniformly and by zipf; and the wear of all of it, until the daemon is idle."""
    count = one.set_bytes // PAGE_BYTES
    with herd(base, count, one.limit_bytes) as process:
        meter = _meter(swap, process)
        before = meter.now()
        process.fill(0, count)
        for access in ("uniform", "zipf"):
            yield f"overcommit-{one.times:g}-{access}", accessed(swap, process, access, accesses, seed)
        swap.settle()
        used = meter.now().since(before)
        # a pool is written back in batches, so that a batch more or less falls into one of the accesses
        written = {"written_bytes": used.disk.written_bytes, "own_written_bytes": used.own_written_bytes}
        yield f"wear-{one.times:g}", {**used.wear, **written, "pages_out": used.pages_out}


def fill(swap: Swap, one: Herd, sizes: Sizes) -> Figures:
    """Write every page for the first time; what fits below the limit is not counted."""
    meter, first = _meter(swap, one), sizes.limit_bytes // PAGE_BYTES
    count = one.members[0].count
    # the cgroup is full after that, so each further page swaps one out
    one.fill(0, first)
    swap.settle()
    own, before = swap.counters(), meter.now()
    ns = one.fill(first, count - first)
    written, held = meter.now().since(before), _grown(swap, own, "latency_held_ms")
    # the rate ends with the last page, the costs when the daemon is idle
    swap.settle()
    used = meter.now().since(before)
    out = max(used.pages_out, 1)
    return {
        "mb_per_s": written.pages_out * PAGE_BYTES / ns * 1e3,
        "pages": out,
        **_cpu_us(used, out),
        "disk_bytes_per_page": used.disk.bytes / out,
        **used.wear,
        **_shares(written),
        **held,
    }


def faults(
    swap: Swap,
    some: Herd,
    sizes: Sizes,
    seed: int,
    cluster: int,
    order: str = "random",
    from_disk: bool = False,
    pause_us: int = 0,
) -> Figures:
    """Touch pages that are swapped out, with a pause between two touches."""
    some.page_out()
    if from_disk and swap.to_disk:
        swap.to_disk()
    swap.settle()
    meter = _meter(swap, some)
    with page_cluster(cluster):
        own, before = swap.counters(), meter.now()
        answers = some.touch(order, sizes.fitting, seed, pause_us)
        used = meter.now().since(before)
    loads = _grown(swap, own, "loads_ram", "loads_disk", "latency_held_ms")
    return {**_latencies(answers), **_cpu_us(used, _touches(answers)), **_shares(used), **_disk(used), **loads}


def idle(swap: Swap, some: Herd, seconds: float) -> Figures:
    """Touch nothing, with pages swapped out."""
    some.page_out()
    swap.settle()
    meter = _meter(swap, some)
    own, before = swap.counters(), meter.now()
    time.sleep(seconds)
    used = meter.now().since(before)
    return {**_shares(used), **_grown(swap, own, "latency_held_ms")}


def accessed(swap: Swap, one: Herd, access: str, count: int, seed: int) -> Figures:
    """Touch and write `count` times, after as many to settle, the same pages for every contender; page-cluster is the machine's."""
    toucher, meter = one.members[0], _meter(swap, one)
    # to settle: the resident set and the pool have to reflect the accesses, not the fill
    toucher.ask(f"access {access} {count} {seed * 2} {_WRITE_PERCENT}")
    own, before = swap.counters(), meter.now()
    figures = toucher.ask(f"access {access} {count} {seed * 2 + 1} {_WRITE_PERCENT}").figures
    used = meter.now().since(before)
    pages = max(used.pages_in + used.pages_out, 1)
    now = swap.counters()
    own_bytes = sum(now[key] - own[key] for key in ("disk_read_bytes", OWN_WRITTEN) if key in now)
    return {
        "touches_per_s": figures["touches"] / figures["ns"] * 1e9,
        "major_share": figures["major"] / figures["touches"],
        "touches": figures["touches"],
        "pages_swapped": pages,
        "disk_bytes_per_page": used.disk.bytes / pages,
        "own_disk_bytes_per_page": own_bytes / pages,
        "disk_bytes_per_touch": used.disk.bytes / figures["touches"],
        **used.wear,
        **_cpu_us(used, figures["touches"]),
        **_disk(used),
        **_ram_used(swap),
    }


@contextmanager
def page_cluster(value: int) -> Iterator[None]:
    """vm.page-cluster set for the block."""
    before = PAGE_CLUSTER.read_text()
    try:
        PAGE_CLUSTER.write_text(str(value))
        yield
    finally:
        PAGE_CLUSTER.write_text(before)


def _meter(swap: Swap, some: Herd) -> Meter:
    return Meter(swap.daemons, some.pids, swap.disk, swap.counters)


def _touches(answers: list[Answer]) -> int:
    return sum(answer.figures["touches"] for answer in answers)


def _latencies(answers: list[Answer]) -> Figures:
    times = sorted(ns for answer in answers for ns in answer.times_ns)
    if not times:
        raise RuntimeError("nothing was swapped out: the figure would be of nothing")
    # of all processes together: from the first touch of any to the last of any
    took_s = (max(answer.figures["end"] for answer in answers) - min(answer.figures["begin"] for answer in answers)) / 1e9
    return {
        "p50_us": percentile(times, 50) / 1e3,
        "p90_us": percentile(times, 90) / 1e3,
        "p99_us": percentile(times, 99) / 1e3,
        "p999_us": percentile(times, 99.9) / 1e3,
        "faults_per_s": len(times) / took_s,
        "mb_per_s": len(times) * PAGE_BYTES / took_s / 1e6,
        "major_share": sum(answer.figures["major"] for answer in answers) / len(times),
        "touches": len(times),
    }


def _cpu_us(used: Usage, events: int) -> Figures:
    parts = {"daemon": used.daemon_s, "kworkers": used.kworkers_s, "kswapd": used.kswapd_s, "process": used.process_s}
    return {f"{name}_cpu_us": seconds / max(events, 1) * 1e6 for name, seconds in parts.items()}


def _shares(used: Usage) -> Figures:
    """Of the time that passed: for how much of it idle CPUs polled, and the CPU of the daemon."""
    cpus = os.cpu_count() or 1
    return {"wall_s": used.wall_s, "polled_share": used.polled_s / used.wall_s / cpus, "daemon_share": used.daemon_s / used.wall_s}


def _grown(swap: Swap, before: Mapping[str, int], *keys: str) -> Figures:
    """By how much those of the swap's own counters have grown that it has."""
    return {key: float(value - before.get(key, 0)) for key, value in swap.counters().items() if key in keys}


def _disk(used: Usage) -> Figures:
    disk = used.disk
    return {"disk_reads": disk.reads, "disk_read_bytes": disk.read_bytes, "disk_writes": disk.writes,
            "disk_written_bytes": disk.written_bytes, **{key: float(value) for key, value in used.swapped.items()}}  # fmt: skip


def _ram_used(swap: Swap) -> Figures:
    counters = swap.counters()
    ram = counters.get("pool_current", counters.get("ram_bytes"))
    return {} if ram is None else {"pool_ram_bytes": ram}
