"""What control/compact is asked for, and what it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from tmemfs.errors import BadValue
from tmemfs.units import parse_seconds

DEFAULT_FACTOR: Final = 1.10


@dataclass(frozen=True, slots=True)
class CompactRequest:
    """A space amplification of the tier to reach, within `deadline_s` seconds."""

    factor: float = DEFAULT_FACTOR
    deadline_s: float = math.inf

    @classmethod
    def parse(cls, text: str) -> CompactRequest:
        """'1.05', '1.05 deadline=10s' or nothing, which means 1.10. Raises BadValue."""
        words = text.split()
        factor = parse_factor(words.pop(0)) if words and "=" not in words[0] else DEFAULT_FACTOR
        deadline_s = math.inf
        for word in words:
            key, _, value = word.partition("=")
            if key != "deadline":
                raise BadValue(f"unknown setting {word!r}: write for example '1.05 deadline=10s'")
            deadline_s = parse_seconds(value)
        return cls(factor, deadline_s)


def parse_factor(text: str) -> float:
    """A space amplification: a number above 1. Raises BadValue."""
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1.0 < factor < 1000.0:
        raise BadValue(f"{text.strip()!r} is not an amplification: give a number above 1, for example 1.10")
    return factor


@dataclass(frozen=True, slots=True)
class CompactAnswer:
    """What a compaction did. Space amplification of the tier before and after; frames gained, segments cleaned, bytes written.

    `reason` says why it fell short of what was `requested`; None: it did not.
    """

    requested: float
    before: float
    after: float
    frames: int
    segments: int
    written: int
    seconds: float
    reason: str | None
