"""The picture of a comparison: latency, CPU, fill, overcommit, fio. Without matplotlib it prints a message instead."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench.statistics import Sample, Spread, by_round, spread


def plot(file: Path, samples: Sequence[Sample], contenders: Sequence[str]) -> None:
    """Write a PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install '.[plot]'", file=sys.stderr)
        return
    figure = Figure(figsize=(15, 8), layout="constrained")
    FigureCanvasAgg(figure)
    (latency, cpu, fill), (uniform, zipf, fio) = figure.subplots(2, 3)
    _latency(latency, samples, contenders)
    _cpu(cpu, samples, contenders)
    _fill(fill, samples, contenders)
    for panel, access in ((uniform, "uniform"), (zipf, "zipf")):
        _overcommit(panel, samples, access)
    _fio(fio, samples)
    figure.savefig(file, dpi=100)


def _of(samples: Sequence[Sample], contender: str, workload: str, figure: str) -> Spread | None:
    return spread(by_round(samples, (contender, workload, figure)).values())


def _latency(panel: Any, samples: Sequence[Sample], contenders: Sequence[str]) -> None:
    for workload, marks in (("ram", "o"), ("disk", "s")):
        for name, color in zip(contenders, _colors(), strict=False):
            keys = ("p50_us", "p90_us", "p99_us", "p999_us")
            seen = [one.median for key in keys if (one := _of(samples, name, workload, key))]
            if len(seen) == len(keys) and (workload == "ram" or name in ("tmemfs", "plain")):
                line = "-" if workload == "ram" else "--"
                panel.plot(["p50", "p90", "p99", "p99.9"], seen, line + marks, color=color, label=f"{name}, {workload}")
    panel.set(yscale="log", ylabel="us", title="swap-in of one page, page-cluster 0")
    panel.legend(fontsize=6)


def _cpu(panel: Any, samples: Sequence[Sample], contenders: Sequence[str]) -> None:
    below = [0.0] * len(contenders)
    for part in ("process", "kworkers", "daemon"):
        seen = [one.median if (one := _of(samples, name, "ram", f"{part}_cpu_us")) else 0.0 for name in contenders]
        panel.bar(range(len(contenders)), seen, bottom=below, label=part)
        below = [a + b for a, b in zip(below, seen, strict=True)]
    panel.set_xticks(range(len(contenders)), contenders, rotation=45, ha="right")
    panel.set(ylabel="us a page", title="CPU of a swap-in from RAM")
    panel.legend()


def _fill(panel: Any, samples: Sequence[Sample], contenders: Sequence[str]) -> None:
    seen = [(at, one) for at, name in enumerate(contenders) if (one := _of(samples, name, "fill", "mb_per_s"))]
    errors = [[one.median - one.least for _, one in seen], [one.most - one.median for _, one in seen]]
    if seen:
        panel.bar([at for at, _ in seen], [one.median for _, one in seen], yerr=errors, capsize=3)
    panel.set_xticks(range(len(contenders)), contenders, rotation=45, ha="right")
    panel.set(ylabel="MB/s", title="swap-out: fill of a cgroup")


def _overcommit(panel: Any, samples: Sequence[Sample], access: str) -> None:
    names = dict.fromkeys(one.contender for one in samples if one.workload.startswith("overcommit"))
    for name in names:
        works = sorted({one.workload for one in samples if one.contender == name and one.workload.endswith(f"-{access}")})
        points = [(float(work.split("-")[1]), one) for work in works if (one := _of(samples, name, work, "touches_per_s"))]
        if points:
            errors = [[one.median - one.least for _, one in points], [one.most - one.median for _, one in points]]
            panel.errorbar([x for x, _ in points], [one.median for _, one in points], yerr=errors, fmt="o-", capsize=3, label=name)
    panel.set(xlabel="working set by limit", ylabel="touches/s", yscale="log", title=f"overcommit, {access}, pool limited")
    if names:
        panel.legend()


def _fio(panel: Any, samples: Sequence[Sample]) -> None:
    works = list(dict.fromkeys(one.workload for one in samples if one.workload.startswith("fio") and "-4k-32-" in one.workload))
    names = list(dict.fromkeys(one.contender for one in samples if one.workload.startswith("fio")))
    for at, name in enumerate(names):
        seen = [one.median if (one := _of(samples, name, work, "iops")) else 0.0 for work in works]
        panel.bar([x + at * 0.4 for x in range(len(works))], seen, 0.4, label=name)
    panel.set_xticks(range(len(works)), [work.removeprefix("fio-") for work in works], rotation=45, ha="right")
    panel.set(ylabel="requests/s", title="fio, 4 KiB, depth 32, by what compresses")
    if names:
        panel.legend()


def _colors() -> list[str]:
    return [f"C{number}" for number in range(10)]
