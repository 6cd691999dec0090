"""The goals of tmemfs relative to its peers, and the columns of the tables that show what it reached. Pure.

The limits were set before anything was measured. No goal is left out. A ratio is judged before it is rounded, and then shown with
three digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from tools.bench.statistics import Goal, Sample, Spread, Verdict, by_round, judge, spread

_US: Final = "tmemfs"
_FLOOR: Final = "floor"
#: Share of a page that can be compressed, in the fio workloads that are judged.
_FIO_PERCENTS: Final = (0, 50, 80)

#: Workload, figure, heading, of the table of all contenders.
COLUMNS: Final = (
    ("ram", "p50_us", "RAM p50 us"), ("ram", "p99_us", "p99"), ("ram", "p999_us", "p99.9"),
    ("ram-readahead", "p50_us", "cluster 3 p50"), ("disk", "p50_us", "disk p50"), ("disk", "p99_us", "p99"),
    ("ram", "daemon_cpu_us", "daemon CPU us"), ("ram", "kworkers_cpu_us", "kworkers"), ("ram", "process_cpu_us", "process"),
    ("fill", "mb_per_s", "fill MB/s"), ("fill", "daemon_cpu_us", "daemon CPU us"), ("fill", "process_cpu_us", "process"),
    ("sequential", "mb_per_s", "sequential MB/s"), ("faults-1", "faults_per_s", "faults/s, 1"),
    ("faults-8", "faults_per_s", "faults/s, 8"), ("stress-vm", "ops_per_s", "stress-ng vm/s"),
    ("stress-vm", "oom_kills", "OOM kills"), ("stress-pageswap", "ops_per_s", "pageswap/s"),
)  # fmt: skip
OVERCOMMIT_COLUMNS: Final = (
    ("touches_per_s", "touches/s"), ("major_share", "faulting"), ("disk_bytes_per_page", "disk bytes per page"),
    ("own_disk_bytes_per_page", "by own counters"), ("disk_bytes_per_touch", "per touch"), ("pool_ram_bytes", "RAM of the pool"),
    ("daemon_cpu_us", "daemon CPU us per touch"), ("process_cpu_us", "process"),
)  # fmt: skip
#: Workload, figure, heading, of the real programs: what they did, and then what one operation of each took.
_OPERATIONS: Final = {"redis": "GET", "pgbench": "transaction", "sort": "line", "compile": "file"}
_REAL_COSTS: Final = (
    ("pages_in", "pages in"), ("pages_out", "pages out"), ("daemon_cpu_us", "daemon CPU us"),
    ("kworkers_cpu_us", "kworkers CPU us"), ("process_cpu_us", "program CPU us"), ("disk_bytes", "disk bytes"),
)  # fmt: skip
REAL_ROWS: Final = (
    ("real-redis", "rate_per_s", "redis, GET/s"), ("real-redis", "p99_us", "redis, p99 us"),
    ("real-pgbench", "rate_per_s", "pgbench, transactions/s"), ("real-sort", "seconds", "sort, s"),
    ("real-compile", "seconds", "compile, s"),
    *((f"real-{name}", figure, f"{name}, {text} per {one}") for name, one in _OPERATIONS.items() for figure, text in _REAL_COSTS),
)  # fmt: skip


def goals(zswaps: Iterable[str]) -> list[Goal]:
    """All of them; those against zswap for each compressor."""
    ours, floor = (_US, "ram"), (_FLOOR, "ram")
    found = [
        Goal("swap-in from RAM, p50, relative to the floor", (*ours, "p50_us"), (*floor, "p50_us"), 1.25),
        Goal("swap-in from RAM, p99, relative to the floor", (*ours, "p99_us"), (*floor, "p99_us"), 2.0),
        Goal("daemon CPU per swap-in, relative to the floor", (*ours, "daemon_cpu_us"), (*floor, "daemon_cpu_us"), 2.0),
        Goal("swap-in from disk, p50, relative to the plain swap file", (_US, "disk", "p50_us"), ("plain", "disk", "p50_us"), 1.2),
        Goal("daemon CPU per page swapped out, relative to lz4", (_US, "fill", "daemon_cpu_us"), ("lz4", "codec", "cpu_us"), 1.3),
        Goal("faults/s of 8 processes, relative to one",
             (_US, "faults-8", "faults_per_s"), (_US, "faults-1", "faults_per_s"), 1.5, True),
        Goal("stress-ng vm, relative to the floor", (_US, "stress-vm", "ops_per_s"), (_FLOOR, "stress-vm", "ops_per_s"), 0.7, True),
    ]  # fmt: skip
    for percent in _FIO_PERCENTS:
        name = f"fio-randwrite-4k-32-{percent}%"
        text = f"fio randwrite 4k, depth 32, {percent}% compressible, relative to the floor"
        found.append(Goal(text, (_US, name, "iops"), (_FLOOR, name, "iops"), 0.7, True))
    for zswap in zswaps:
        found += _beside_zswap(zswap)
    return found


def _beside_zswap(zswap: str) -> list[Goal]:
    found = [Goal(f"fill, MB/s, relative to {zswap}", (_US, "fill", "mb_per_s"), (zswap, "fill", "mb_per_s"), 1.0, True)]
    for times in (3, 4):
        for access in ("uniform", "zipf"):
            name, what = f"overcommit-{times}-{access}", f"{times} x the limit, {access}"
            for figure, text, limit, at_least in (
                ("touches_per_s", "touches/s", 2.0, True),
                ("disk_bytes_per_page", "disk bytes per page swapped", 0.45, False),
            ):
                found.append(
                    Goal(f"{what}: {text}, relative to {zswap}", (_US, name, figure), (zswap, name, figure), limit, at_least)
                )
    return found


def verdicts(samples: Sequence[Sample]) -> list[Verdict]:
    """Every goal whose figures could have been measured in these rounds."""
    zswaps = sorted({one.contender for one in samples if one.contender.startswith("zswap")})
    return [judge(goal, samples) for goal in goals(zswaps)]


def goal_table(judged: Iterable[Verdict]) -> str:
    """Markdown, a row per goal; one that was not measured says so."""
    head = "| figure | goal | ratio | least to most | ours | beside | verdict |\n|---|---|---|---|---|---|---|\n"
    return head + "".join(_goal_row(one) for one in judged)


def _goal_row(one: Verdict) -> str:
    goal = f"{'>=' if one.goal.at_least else '<='} {one.goal.limit:g}"
    if one.ratio is None or one.ours is None or one.theirs is None:
        return f"| {one.goal.text} | {goal} | - | - | - | - | not measured |\n"
    verdict = "met" if one.is_met else "**not met**"
    extremes = f"{one.ratio.least:.3f} to {one.ratio.most:.3f}"
    figures = f"{number(one.ours.median)} | {number(one.theirs.median)}"
    return f"| {one.goal.text} | {goal} | {one.ratio.median:.3f} | {extremes} | {figures} | {verdict} |\n"


def contender_table(samples: Sequence[Sample], contenders: Sequence[str]) -> str:
    """Markdown: medians over the rounds, a row per contender."""
    rows = []
    for name in contenders:
        cells = [spread(by_round(samples, (name, work, figure)).values()) for work, figure, _ in COLUMNS]
        rows.append([name, *map(cell, cells)])
    return markdown(["", *(heading for _, _, heading in COLUMNS)], rows)


def overcommit_table(samples: Sequence[Sample]) -> str:
    """Markdown: medians over the rounds, a row per working set and contender."""
    pairs = dict.fromkeys((one.workload, one.contender) for one in samples if one.workload.startswith("overcommit"))
    rows = []
    for work, name in sorted(pairs):
        cells = [spread(by_round(samples, (name, work, figure)).values()) for figure, _ in OVERCOMMIT_COLUMNS]
        rows.append([work.removeprefix("overcommit-").replace("-", " x, "), name, *map(cell, cells)])
    return markdown(["set", "", *(heading for _, heading in OVERCOMMIT_COLUMNS)], rows)


def real_table(samples: Sequence[Sample]) -> str:
    """Markdown: medians over the rounds, a row per figure of the real programs."""
    names = list(dict.fromkeys(one.contender for one in samples if one.workload.startswith("real")))
    rows = []
    for work, figure, heading in REAL_ROWS:
        cells = [spread(by_round(samples, (name, work, figure)).values()) for name in names]
        if any(cells):
            rows.append([heading, *map(cell, cells)])
    return markdown(["real programs", *names], rows)


def fio_table(samples: Sequence[Sample]) -> str:
    """Markdown: requests per second, a row per job."""
    names = list(dict.fromkeys(one.contender for one in samples if one.workload.startswith("fio")))
    rows = []
    for work in dict.fromkeys(one.workload for one in samples if one.workload.startswith("fio")):
        ours = [spread(by_round(samples, (name, work, "iops")).values()) for name in names]
        rows.append([work.removeprefix("fio-"), *map(cell, ours)])
    return markdown(["fio, requests/s", *names], rows)


def number(value: float) -> str:
    """A figure with three digits or more."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def cell(one: Spread | None) -> str:
    """The median, or a dash."""
    return number(one.median) if one else "-"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
