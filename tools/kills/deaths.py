"""What a run counted, as a table. Pure."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from tools.bench.statistics import percentile

#: The goal for the 99th percentile of all stalls.
GOAL_P99_S: Final = 1.0
STOPPED: Final = "stopped"
#: What supervisors count of their workers.
COUNTED: Final = ("worker_killed", "worker_crashed", "worker_hung", "upgrades", "poisoned_requests")
_HEADINGS: Final = ("the worker died while", "strikes", "deaths", "seen", "ending p50 ms", "stall p50 ms", "p99 ms", "longest ms")


@dataclass(frozen=True, slots=True)
class Strike:
    """One or more deaths in a row, and the stall from the first signal until page requests were answered again.

    `is_seen`: the phase was seen within the last look before the signal. `ending_s` is the part of the stall that the kernel took
    to end the killed processes.
    """

    phase: str
    deaths: int
    is_seen: bool
    stall_s: float
    ending_s: float = 0.0


@dataclass(slots=True)
class Tally:
    """Counts of one run. `faults` is empty if it passed."""

    seed: int
    strikes: list[Strike] = field(default_factory=list)
    verified: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    supervisors: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    load_average: float = 0.0

    @property
    def deaths(self) -> int:
        """All deaths."""
        return sum(strike.deaths for strike in self.strikes)

    def miscounted(self) -> list[str]:
        """What the supervisors say of their workers that is not so, or must not be. An upgrade ends workers too."""
        said, stopped = self.supervisors, sum(strike.deaths for strike in self.strikes if strike.phase == STOPPED)
        wrong = [f"{key} is {said[key]}" for key in ("worker_crashed", "poisoned_requests") if said[key]]
        if not any(strike.phase.startswith("upgrade") for strike in self.strikes):
            for key, deaths in (("worker_killed", self.deaths - stopped), ("worker_hung", stopped)):
                wrong += [f"{key} is {said[key]} after {deaths} such deaths"] if said[key] != deaths else []
        return wrong

    def lines(self) -> list[str]:
        """The summary as lines to print."""
        verdict = "FAILED" if self.faults else "passed"
        return [
            f"{self.deaths} deaths of a worker in {self.seconds:.0f} s, seed {self.seed}: {verdict}",
            f"load average of the last minute: {self.load_average:.1f} on {os.cpu_count()} cores",
            *table(self.strikes),
            _counted("verified", self.verified),
            _counted("control requests", self.requests),
            _counted("the supervisors say", self.supervisors),
            *(f"FAULT: {fault}" for fault in self.faults),
        ]


def table(strikes: Sequence[Strike]) -> list[str]:
    """The stalls by phase, and of all."""
    phases = list(dict.fromkeys(strike.phase for strike in strikes))
    rows = [_row(phase, [strike for strike in strikes if strike.phase == phase]) for phase in sorted(phases)]
    rows = [list(_HEADINGS), *rows, *([_row("all", strikes)] if strikes else [])]
    widths = [max(len(row[at]) for row in rows) for at in range(len(_HEADINGS))]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
            for row in rows]  # fmt: skip


def _row(name: str, strikes: Sequence[Strike]) -> list[str]:
    stalls = sorted(strike.stall_s * 1e3 for strike in strikes)
    endings = sorted(strike.ending_s * 1e3 for strike in strikes)
    figures = [percentile(endings, 50), percentile(stalls, 50), percentile(stalls, 99), stalls[-1]]
    counts = [len(strikes), sum(strike.deaths for strike in strikes), sum(strike.is_seen for strike in strikes)]
    return [name, *map(str, counts), *(f"{figure:.1f}" for figure in figures)]


def _counted(name: str, counts: Counter[str]) -> str:
    return f"{name}: " + (", ".join(f"{key} {count}" for key, count in sorted(counts.items())) or "none")
