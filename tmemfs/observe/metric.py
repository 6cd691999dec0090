"""What a metric is: one figure of a running daemon, with its name, kind, unit, meaning, source, and the files that show it.

Knows neither which metrics there are (registry.py) nor how a file is written (report.py, prometheus.py). It imports nothing of the
store, of trio or of pyfuse3, because the command loads the registry for the units of what it prints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from tmemfs.observe.snapshot import Snapshot

#: What a metric reads: a number, a text, or None where it does not apply now. An infinite number means that there is no limit.
Value: TypeAlias = int | float | str | None
#: gauge: a value of this moment; counter: a total since the start of the daemon, which never falls; info: a text or an identity.
Kind = Literal["gauge", "counter", "info"]
#: The unit of a value; '1' is a plain number, '0/1' says no or yes, '-' is for texts. kB is 1024 bytes, as in /proc/meminfo.
Unit = Literal["bytes", "pages", "segments", "records", "requests", "ms", "us", "kB", "1", "0/1", "-"]
#: The control files made from metrics.
Output = Literal["stat", "events", "metrics", "mm_stat", "io_stat", "bd_stat"]

#: Figures for people and for Prometheus alike.
STAT: Final[frozenset[Output]] = frozenset(("stat", "metrics"))
#: Texts and the process: Prometheus takes numbers, and a process id is none.
STAT_ONLY: Final[frozenset[Output]] = frozenset(("stat",))
EVENTS: Final[frozenset[Output]] = frozenset(("events", "metrics"))


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure. `read` takes it from a snapshot and must not scan slots or segments."""

    name: str
    kind: Kind
    unit: Unit
    help: str
    read: Callable[[Snapshot], Value]
    outputs: frozenset[Output] = STAT


@dataclass(frozen=True, slots=True)
class Section:
    """Metrics that belong together, under `title` in the documentation."""

    title: str
    metrics: tuple[Metric, ...]
