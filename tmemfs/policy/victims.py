"""Victims of write-back: the oldest segment first, with a second chance for one that was loaded from.

Second chance after Corbato, 'A Paging Experiment with the Multics System' (1968). Decision 7 has the measurement.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final, TypeVar

T = TypeVar("T")

#: Segments that one search for a victim examines, at most. It bounds the time that the search holds the store's lock.
MOST_EXAMINED: Final = 32


def next_victim(oldest_first: Iterable[tuple[T, bool]]) -> tuple[T | None, list[T]]:
    """The first segment that was not loaded from, and those passed over before it.

    `oldest_first` pairs each segment with whether it was loaded from. If all of them were, the oldest is the victim.
    """
    passed: list[T] = []
    for segment, was_loaded in islice(oldest_first, MOST_EXAMINED):
        if not was_loaded:
            return segment, passed
        passed.append(segment)
    # All were loaded from, or all that were examined: the order of age decides, as if none was.
    return (passed[0], passed[1:]) if passed else (None, passed)
