"""Statistics of many rounds: percentiles, medians, ratios per round, goals. Pure.

A goal compares, in the same round, two contenders' figures, two figures of one contender, or a figure with a constant. The median
of the rounds' ratios decides. Nothing is rounded before it is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

#: contender, workload, figure.
Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Sample:
    """The figures of one workload with one contender in one round."""

    round: int
    contender: str
    workload: str
    figures: dict[str, float]


@dataclass(frozen=True, slots=True)
class Spread:
    """The median and the extremes of a figure over the rounds."""

    median: float
    least: float
    most: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Goal:
    """The ratio of a figure to that of `against` (another contender, workload or figure) is at most, or at least, `limit`."""

    text: str
    figure: Key
    against: Key
    limit: float
    at_least: bool = False

    def is_met(self, ratio: float) -> bool:
        """Whether `ratio` is within the limit."""
        return ratio >= self.limit if self.at_least else ratio <= self.limit


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a goal: both figures and their ratio with its extremes, None where a figure was not measured."""

    goal: Goal
    ours: Spread | None
    theirs: Spread | None
    ratio: Spread | None

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is met; None if it was not measured."""
        return self.goal.is_met(self.ratio.median) if self.ratio else None


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The percentile by nearest rank: the smallest value that `percent` of all do not exceed."""
    if not ordered:
        raise ValueError("no values")
    rank = -(-len(ordered) * percent // 100)
    return ordered[min(max(int(rank), 1), len(ordered)) - 1]


def spread(values: Iterable[float]) -> Spread | None:
    """Median and extremes; None without values."""
    some = list(values)
    return Spread(median(some), min(some), max(some), len(some)) if some else None


def by_round(samples: Iterable[Sample], key: Key) -> dict[int, float]:
    """A figure by round, for the rounds that have it."""
    contender, workload, figure = key
    return {
        one.round: one.figures[figure]
        for one in samples
        if (one.contender, one.workload) == (contender, workload) and figure in one.figures
    }


def judge(goal: Goal, samples: Sequence[Sample]) -> Verdict:
    """The result of `goal` in `samples`."""
    ours, theirs = by_round(samples, goal.figure), by_round(samples, goal.against)
    ratios = [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys()) if theirs[number]]
    return Verdict(goal, spread(ours.values()), spread(theirs.values()), spread(ratios))
