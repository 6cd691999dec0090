"""Metrics as Prometheus text, version 0.0.4 of the exposition format.

A name is `tmemfs_` and the metric's, in base units: ms and us become seconds, kB becomes bytes. A counter ends in `_total`. All
texts are labels of one metric, `tmemfs_info`, whose value is always 1. What does not apply now is left out; no limit is +Inf.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Final

from tmemfs.observe.metric import Metric, Unit, Value

_INFO: Final = "tmemfs_info"
#: Units that are no base units: the word of a name that stands for the unit, the base unit, and one of it in that.
_BASE: Final[dict[Unit, tuple[str, str, float]]] = {
    "ms": ("ms", "seconds", 1e-3),
    "us": ("us", "seconds", 1e-6),
    "kB": ("kbytes", "bytes", 1024),
}
#: Digits after the point: a microsecond is one.
_DIGITS: Final = 6


def exposition(values: Iterable[tuple[Metric, Value]]) -> str:
    """The text of `values`."""
    labels: list[str] = []
    lines: list[str] = []
    for metric, value in values:
        if metric.kind == "info":
            # all texts are labels of one metric: a codec that changes ends one series, and not every one
            labels.append(f'{metric.name}="{_label(str(value))}"')
        elif isinstance(value, int | float):  # None has no number: the format can only leave it out
            lines.append(f"{_head(metric)} {_number(metric, value)}\n")
    info = f"# HELP {_INFO} What is running.\n# TYPE {_INFO} gauge\n{_INFO}{{{','.join(labels)}}} 1\n" if labels else ""
    return info + "".join(lines)


def name_of(metric: Metric) -> str:
    """The metric's name for Prometheus."""
    words = metric.name.split("_")
    if base := _BASE.get(metric.unit):
        words = [base[1] if word == base[0] else word for word in words]
    return "_".join(["tmemfs", *words, *(["total"] if metric.kind == "counter" else [])])


@cache
def _head(metric: Metric) -> str:
    """All but the value, which never changes: it is made once, since a scrape makes it for every metric."""
    name = name_of(metric)
    # only a backslash and the end of a line have to be escaped in a help text
    meaning = metric.help.replace("\\", r"\\").replace("\n", r"\n")
    return f"# HELP {name} {meaning}\n# TYPE {name} {metric.kind}\n{name}"


def _label(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(metric: Metric, value: int | float) -> str:
    if math.isinf(value):  # a series that ended would look like a daemon that has gone
        return "+Inf"
    base = _BASE.get(metric.unit)
    scaled = value * base[2] if base else value
    # a product such as 1001 * 1e-3 has digits of noise
    return str(round(scaled, _DIGITS)) if isinstance(scaled, float) else str(scaled)
