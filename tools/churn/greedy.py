"""Baselines: a simulated log of equal records with a greedy cleaner, and the bound for uniform overwrite.

The simulation has only segments of RECORDS records. Each overwrite makes one record dead and appends one; when no segment is free,
the emptiest full one is cleaned. Its write amplification is (appended + moved) / appended.

The bound: if every record is equally likely to be overwritten, and segments are cleaned in order of age, the live share u of a
cleaned segment solves u = exp(-(1 - u) / utilisation), and the write amplification is 1 / (1 - u). Source: P. Desnoyers,
'Analytic Models of SSD Write Performance', ACM Transactions on Storage 10(2), 2014, for LRU cleaning, which greedy approaches
from below as segments grow.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from math import exp
from typing import Final

from tools.churn.workloads import Operation

RECORDS: Final = 640


def bound(utilisation: float) -> float:
    """Write amplification of uniform overwrite with cleaning in order of age."""
    live = utilisation / 2
    for _ in range(1000):
        live = exp(-(1 - live) / utilisation)
    return 1 / (1 - live)


class Greedy:
    """`slots` records, `utilisation` of the log's capacity."""

    def __init__(self, slots: int, utilisation: float) -> None:
        self._segments = int(slots / utilisation) // RECORDS + 3
        self._live: list[set[int]] = [set() for _ in range(self._segments)]
        self._free = list(range(1, self._segments))
        self._where = array("i", [-1]) * slots
        self._open, self._fill = 0, 0
        self.appended = self.moved = 0

    def run(self, operations: Iterator[Operation], count: int, note: Callable[[], None] = lambda: None) -> None:
        """Perform `count` page operations."""
        done = 0
        while done < count:
            kind, first, pages = next(operations)
            for slot in range(first, first + pages):
                self._kill(slot)
                if kind == "store":
                    self._append(slot)
                    self.appended += 1
            done += pages

    def _kill(self, slot: int) -> None:
        if (old := self._where[slot]) >= 0:
            self._live[old].discard(slot)
            self._where[slot] = -1

    def _append(self, slot: int) -> None:
        if self._fill == RECORDS:
            self._open_next()
        self._live[self._open].add(slot)
        self._where[slot] = self._open
        self._fill += 1

    def _open_next(self) -> None:
        self._open, self._fill = self._free.pop(), 0
        while not self._free:
            closed = (segment for segment in range(self._segments) if segment != self._open)
            victim = min(closed, key=lambda segment: len(self._live[segment]))
            live = self._live[victim]
            self._live[victim] = set()
            self._free.append(victim)
            self.moved += len(live)
            for slot in live:
                self._append(slot)
