"""Damage that loads have found, and that nobody has acknowledged yet.

Each damaged record is counted once, however often it is loaded. The kernel asks for it again: for the rest of a request that was
answered in part, and for each process that has the page. Such a load fails like the first one, and is no more damage.

A record is identified by the seed of its segment (record.py), which changes with each use of the segment, and its offset there. So
a record that was damaged in RAM and then written back is one record.

Thread-safety: any thread may call every method. They take a lock of their own, also under the store's lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final, Literal

#: Records that are remembered: 1 MB at most. With more damage than that, some of it is counted again.
MOST_RECORDS: Final = 4096

Place = Literal["in_ram", "on_tier"]


@dataclass(frozen=True, slots=True)
class Unacknowledged:
    """Damaged records by the place where they were found, and reads that the tier failed, since the last `acknowledge`."""

    in_ram: int = 0
    on_tier: int = 0
    failed_reads: int = 0

    def __bool__(self) -> bool:
        return bool(self.in_ram or self.on_tier or self.failed_reads)


class Damage:
    """What loads have found. `since_acknowledged` is frozen, so it may be read without a lock."""

    def __init__(self) -> None:
        self.since_acknowledged = Unacknowledged()
        self._lock: Final = threading.Lock()
        self._known: Final[set[tuple[int, int]]] = set()
        self._tell: Callable[[], None] = _nobody

    def note_record(self, seed: int, offset: int, place: Place) -> bool:
        """The record at `offset` of the segment with `seed` is damaged. Whether that was not known."""
        with self._lock:
            if (seed, offset) in self._known:
                return False
            if len(self._known) == MOST_RECORDS:
                self._known.clear()
            self._known.add((seed, offset))
            found = self.since_acknowledged
            if place == "in_ram":
                self.since_acknowledged = replace(found, in_ram=found.in_ram + 1)
            else:
                self.since_acknowledged = replace(found, on_tier=found.on_tier + 1)
        self._tell()
        return True

    def note_failed_read(self) -> None:
        """The tier failed to read a record."""
        with self._lock:
            self.since_acknowledged = replace(self.since_acknowledged, failed_reads=self.since_acknowledged.failed_reads + 1)
        self._tell()

    def acknowledge(self) -> None:
        """The administrator knows of all that was found. What is known already is not reported again."""
        with self._lock:
            self.since_acknowledged = Unacknowledged()
        self._tell()

    @contextmanager
    def told_to(self, tell: Callable[[], None]) -> Iterator[None]:
        """Meanwhile `tell` is called, in any thread and perhaps under the store's lock, when there is something new."""
        self._tell = tell
        try:
            yield
        finally:
            self._tell = _nobody


def _nobody() -> None:
    """Nobody is told."""
