"""`python -m tools.bench.summary [--output DIR]`: one page of all comparisons in DIR, in words and in one picture.

Reads DIR/peers*.json, one file per disk, read-ahead and PM QoS, and writes summary.md and summary.png. The words are pure: every
figure is the median over the rounds, and a ratio that is rounded never flatters tmemfs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tools.bench.accounts import OWN_WEAR
from tools.bench.goals import number
from tools.bench.statistics import Sample, by_round, spread

_US: Final = "tmemfs"
#: Kinds of contenders that users choose between, in the order of the words and of the picture.
_KINDS: Final = ("tmemfs", "zram", "zswap", "plain")


@dataclass(frozen=True, slots=True)
class Question:
    """What a user asks, and the figure that answers it."""

    text: str
    workload: str
    figure: str
    unit: str
    more_is_better: bool = False


_TIMES: Final = ("1.5", "2", "3", "4")
_WHERE: Final = {"ram": "pages in RAM", "disk": "pool limited"}
QUESTIONS: Final = (
    Question("a page fault from RAM, p50", "ram", "p50_us", "us"),
    Question("a page fault from RAM, p99", "ram", "p99_us", "us"),
    Question("a page fault from disk, p50", "disk", "p50_us", "us"),
    Question("swap-out", "fill", "mb_per_s", "MB/s", True),
    Question("sequential swap-in", "sequential", "mb_per_s", "MB/s", True),
    *(Question(f"{times} times the memory, {access}", f"overcommit-{times}-{access}", "touches_per_s", "touches/s", True)
      for times in _TIMES for access in ("uniform", "zipf")),
    *(Question(f"wear at {times} times the memory", f"wear-{times}", OWN_WEAR, "bytes written per page out") for times in _TIMES),
    *(Question(f"{program} resumed, {where}", f"resume-{source}-{program}", "answer_s", "s")
      for source, where in _WHERE.items() for program in ("redis", "python", "jvm")),
    *(Question(f"{program} in half its memory", f"real-{name}", figure, unit, more_is_better=figure == "rate_per_s")
      for program, name, figure, unit in (
          ("redis", "redis", "rate_per_s", "GET/s"), ("PostgreSQL", "pgbench", "rate_per_s", "transactions/s"),
          ("sort", "sort", "seconds", "s"), ("two compilers", "compile", "seconds", "s"))),
)  # fmt: skip
#: The questions of the picture, by the first that was measured.
_PANELS: Final = (
    ("overcommit-3-zipf", "overcommit-3-uniform"), ("wear-3",), ("resume-disk-redis", "resume-disk-python", "resume-disk-jvm"),
)  # fmt: skip


def main() -> int:
    """Write the page and the picture, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="where peers*.json are, and the summary goes")
    place: Path = parser.parse_args().output
    runs = {title(kept["machine"]): kept for file in sorted(place.glob("peers*.json")) for kept in [json.loads(file.read_text())]}
    if not runs:
        print(f"bench: no results in {place}: run 'python -m tools.bench.peers' first", file=sys.stderr)
        return 2
    text = "\n".join(of_run(kept["machine"], samples_of(kept), kept.get("checks", [])) for kept in runs.values())
    (place / "summary.md").write_text(text)
    print(text)
    draw(place / "summary.png", {name: samples_of(kept) for name, kept in runs.items()})
    return 0


def samples_of(kept: Mapping[str, Any]) -> list[Sample]:
    """The samples in a file of results."""
    return [Sample(**one) for one in kept["samples"]]


def title(machine: Mapping[str, Any]) -> str:
    """The name of the conditions of a run."""
    return str(machine.get("conditions", {}).get("name", "fast"))


def of_run(machine: Mapping[str, Any], samples: Sequence[Sample], checks: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: what was compared, and a line per question that was measured."""
    found = machine.get("conditions", {})
    rounds = len({one.round for one in samples})
    head = [
        f"**{found.get('disk', 'fast (no limit)')}**, page-cluster {found.get('page_cluster', '3')}, /dev/cpu_dma_latency "
        f"{found.get('cpu_dma_latency', 'as each contender has it')}; commit {machine.get('commit', 'unknown')}, "
        f"{rounds} round{'' if rounds == 1 else 's'}, medians:\n"
    ]
    lines = [line for question in QUESTIONS if (line := answer(question, samples))]
    return "\n".join([*head, *(f"- {line}" for line in [*lines, _kills(samples), _held(checks)] if line)]) + "\n"


def answer(question: Question, samples: Sequence[Sample]) -> str:
    """The answer in a line: tmemfs, and its ratio to each of the others; empty if nothing was measured."""
    found = _medians(question.workload, question.figure, samples)
    if not found:
        return ""
    ours = found.pop(_US, None)
    others = [f"{_ratio(question, ours, value)}{name} ({number(value)})" for name, value in found.items()]
    own = f"tmemfs {number(ours)} {question.unit}" if ours is not None else f"tmemfs has no figure ({question.unit})"
    return f"{question.text}: {'; '.join([own, ', '.join(others)] if others else [own])}"


def _ratio(question: Question, ours: float | None, theirs: float) -> str:
    if ours is None or not theirs:
        return ""
    # rounded to the side that does not flatter
    towards = math.floor if question.more_is_better else math.ceil
    return f"{towards(ours / theirs * 100) / 100:.2f} of "


def _medians(workload: str, figure: str, samples: Sequence[Sample]) -> dict[str, float]:
    """By contender, those that users choose between."""
    spreads = {name: spread(by_round(samples, (name, workload, figure)).values()) for name in _named(samples)}
    return {name: one.median for name, one in spreads.items() if one}


def _named(samples: Iterable[Sample]) -> list[str]:
    """The contenders that users choose between, in their order."""
    return sorted({one.contender for one in samples if _rank(one.contender) is not None}, key=lambda one: (_rank(one), one))


def _rank(contender: str) -> int | None:
    """Where a contender is named; None for those that are there to measure the others by."""
    kind = contender.partition("-")[0]
    return _KINDS.index(kind) if kind in _KINDS and contender != "tmemfs-pyfuse3" else None


def _kills(samples: Iterable[Sample]) -> str:
    """What the OOM killer ended; empty if no program was run that it might have."""
    counts: dict[tuple[str, str], int] = {}
    for one in samples:
        if one.workload.startswith("kills-"):
            key = (one.contender, one.workload.removeprefix("kills-"))
            counts[key] = counts.get(key, 0) + int(one.figures["oom_kills"])
    some = [f"{name}, {program}: {count}" for (name, program), count in counts.items() if count]
    return f"processes ended by the OOM killer: {'; '.join(some) or 'none'}" if counts else ""


def _held(checks: Sequence[Mapping[str, Any]]) -> str:
    over = [f"{one['part']} {one['contender']}: {one['excess']}" for one in checks if one["excess"]]
    return f"the disk did more than its limits allow: {'; '.join(over)}" if over else ""


def draw(file: Path, runs: Mapping[str, Sequence[Sample]]) -> None:
    """Write a PNG: a panel per question, a group of bars per run. Without matplotlib it prints a message instead."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install '.[plot]'", file=sys.stderr)
        return
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    colors = {name: f"C{at}" for at, name in enumerate(_named(one for samples in runs.values() for one in samples))}
    for panel, workloads in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        _panel(panel, [one for work in workloads for one in QUESTIONS if one.workload == work], runs, colors)
    figure.savefig(file, dpi=100)


def _panel(panel: Any, questions: Sequence[Question], runs: Mapping[str, Sequence[Sample]], colors: Mapping[str, str]) -> None:
    """The first of `questions` that was measured."""
    measured = [(one, {run: _medians(one.workload, one.figure, samples) for run, samples in runs.items()}) for one in questions]
    question, figures = next(((one, found) for one, found in measured if any(found.values())), measured[0])
    width = 0.8 / max(len(colors), 1)
    for at, (name, color) in enumerate(colors.items()):
        bars = [(x + at * width, found[name]) for x, found in enumerate(figures.values()) if name in found]
        if bars:
            drawn = panel.bar([x for x, _ in bars], [value for _, value in bars], width, label=name, color=color)
            panel.bar_label(drawn, [number(value) for _, value in bars], fontsize=7)
    panel.set_xticks([x + 0.4 - width / 2 for x in range(len(figures))], list(figures))
    better = "more is better" if question.more_is_better else "less is better"
    panel.set(ylabel=f"{question.unit}, {better}", title=question.text)
    if any(figures.values()):
        # from zero: a cut or logarithmic axis would change what the bars say
        panel.margins(y=0.3)
        panel.legend(fontsize=8, loc="upper center", ncols=len(colors))


if __name__ == "__main__":
    sys.exit(main())
