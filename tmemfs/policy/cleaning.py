"""Cleaning and compaction: which segments are worth merging, and when the background merges them.

Victims on the tier are ranked by benefit per cost, after Rosenblum and Ousterhout, 'The Design and Implementation of a
Log-Structured File System' (1992), section 3.6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

#: A segment is written back as it is if this share of it lives. Otherwise its live records are first merged with others'.
DENSE_SHARE: Final = 0.95
#: Records that were encoded again are kept if they take this share of what they took before, or less.
KEPT_SHARE: Final = 0.9
#: How much the age of a segment counts for its cleaning.
AGE_EXPONENT: Final = 0.25
#: The background merges above START until below STOP, where at least DEAD_BYTES are dead. The gap between START and STOP keeps it
#: from stopping after each merge and starting again with the next page that is invalidated.
START_AMPLIFICATION: Final = 1.5
STOP_AMPLIFICATION: Final = 1.3
DEAD_BYTES: Final = 8 << 20
#: It also cleans while the tier has less than this free: a full tier makes stores wait.
FREE_BYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Space:
    """RAM or the tier: bytes its segments occupy, bytes of live records in them, and bytes still free for more."""

    occupied: int
    live: int
    free: int

    @property
    def dead(self) -> int:
        """Bytes occupied by records that no slot refers to, and by gaps."""
        return self.occupied - self.live

    @property
    def amplification(self) -> float:
        """Space amplification: bytes occupied per live byte; 1 where nothing is stored."""
        return self.occupied / self.live if self.live else 1.0 + (self.occupied > 0)


def is_sparse(live_bytes: int, fill_bytes: int) -> bool:
    """Whether too little of a segment lives for it to be written as it is."""
    return live_bytes < DENSE_SHARE * fill_bytes


def saves_enough(before_bytes: int, after_bytes: int) -> bool:
    """Whether encoding records again saved a tenth, which is worth their slower loads."""
    return after_bytes <= KEPT_SHARE * before_bytes


def benefit_per_cost(live_share: float, age: float) -> float:
    """What cleaning a segment is worth: the space it frees, weighed by how long that stays free, per byte read and written.

    The age counts by its fourth root: hot pages are overwritten while they are in RAM, so what reaches the tier differs less in age
    than a whole log (docs/decisions/0005: 1.35 bytes written per byte stored under zipf, 1.58 with the age itself, 1.44 without
    it).
    """
    return (1 - live_share) * math.pow(age, AGE_EXPONENT) / (1 + live_share)


def greedy(live_share: float, age: float) -> float:
    """What cleaning a segment is worth to the greedy policy, the one to compare with: the emptiest first."""
    return 1 - live_share


def compaction_wanted(space: Space, compacting: bool) -> bool:
    """Whether the background has to merge segments now, because so much of `space` is dead."""
    threshold = STOP_AMPLIFICATION if compacting else START_AMPLIFICATION
    return space.dead >= DEAD_BYTES and space.amplification > threshold


def cleaning_wanted(space: Space, cleaning: bool) -> bool:
    """Whether the background has to clean the tier now, because so much of it is dead or so little is free."""
    # On a small tier FREE_BYTES would be most of it, so a share of what is occupied bounds the threshold.
    least_free = min(FREE_BYTES, space.occupied // 64)
    # Twice as much ends it as starts it, for the same hysteresis as above. Without dead bytes cleaning would free nothing.
    if space.free < least_free * (1 + cleaning) and space.dead > least_free:
        return True
    return compaction_wanted(space, cleaning)
