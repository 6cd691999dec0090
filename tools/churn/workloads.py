"""Workloads: endless streams of page operations, as (operation, first slot, count).

uniform    every slot is equally likely to be overwritten
zipf       the slot of rank r is overwritten with a probability proportional to 1/r^0.99; ranks are scattered over the slots
processes  runs of slots are stored, rewritten in part, and then discarded as a whole, as if processes start and end
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from random import Random
from typing import Final

ZIPF: Final = 0.99
_DRAWN_AT_ONCE: Final = 4096
_SMALLEST, _LARGEST = 64, 4096

Operation = tuple[str, int, int]


def uniform(slots: int, random: Random) -> Iterator[Operation]:
    """Overwrites of single slots."""
    while True:
        yield "store", random.randrange(slots), 1


def zipf(slots: int, random: Random) -> Iterator[Operation]:
    """Overwrites of single slots, a few of them often."""
    ranked = list(range(slots))
    random.shuffle(ranked)
    weights = list(accumulate(1 / rank**ZIPF for rank in range(1, slots + 1)))
    while True:
        for slot in random.choices(ranked, cum_weights=weights, k=_DRAWN_AT_ONCE):
            yield "store", slot, 1


def processes(slots: int, random: Random) -> Iterator[Operation]:
    """Runs of slots that are stored, rewritten in part, and discarded in another order."""
    bounds = _cut(slots, random)
    alive = dict.fromkeys(range(len(bounds) - 1), False)
    while True:
        number = random.choice(list(alive))
        first, count = bounds[number], bounds[number + 1] - bounds[number]
        if alive[number]:
            yield "discard", first, count
        for start in range(first, first + count, 32):
            yield "store", start, min(32, first + count - start)
        for _ in range(count // 2):
            yield "store", first + random.randrange(count), 1
        alive[number] = True


def _cut(slots: int, random: Random) -> list[int]:
    """The bounds of runs of many sizes."""
    bounds = [0]
    while bounds[-1] < slots:
        bounds.append(min(bounds[-1] + int(_SMALLEST * (_LARGEST / _SMALLEST) ** random.random()), slots))
    return bounds


WORKLOADS: Final = {"uniform": uniform, "zipf": zipf, "processes": processes}
