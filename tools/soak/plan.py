"""Which action comes next: a random sequence, with all values, that depends on a seed alone. Pure: it touches nothing.

When an action happens depends on how long those before it took, so a seed repeats the actions but not their times.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from random import Random
from typing import Final

#: The swap whose backing can run full, and the one whose backing cannot.
SMALL, ORDINARY = "small", "ordinary"
PLACES: Final = (SMALL, ORDINARY)
SIGNALS: Final = ("HUP", "USR1", "USR2", "QUIT", "ALRM", "VTALRM", "XCPU", "XFSZ", "TERM")
#: Control files that accept values, the kind by which the command line names them, and values for them.
SETTINGS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "codec": ("codec", ("lz4", "zstd", "zstd:3", "none")),
    "recompress": ("recompress", ("off", "zstd", "zstd:1")),
    "pool.max": ("limits", ("12M", "16M", "24M", "32M", "48M")),
    "backing.max": ("limits", ("24M", "32M", "max", "max")),
    "pressure.mode": ("pressure", ("auto", "auto", "manual", "off")),
    "pressure.reserve": ("pressure", ("16M", "512M", "5%", "20%")),
    "writeahead": ("ahead", ("0", "25", "90")),
    "writeahead.rest": ("ahead", ("0", "1", "30")),
    "clean.rate": ("cleaning", ("1M", "16M", "64M")),
}
_SHRINKS: Final = ("1M", "4M", "16M", "all", "all deadline=50ms", "8M deadline=1s")
_FACTORS: Final = ("1.50", "1.10", "1.02", "1.005")


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to do at one place. `name` says what within its kind: a control file, a signal."""

    kind: str
    place: str
    name: str = ""
    value: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.kind, self.place, self.name, self.value)))


def _setting(random: Random, kind: str, place: str) -> Action:
    name = random.choice([name for name, (group, _) in SETTINGS.items() if group == kind])
    return Action(kind, place, name, random.choice(SETTINGS[name][1]))


def _of(values: tuple[str, ...]) -> Callable[[Random, str, str], Action]:
    return lambda random, kind, place: Action(kind, place, kind, random.choice(values))


def _plain(random: Random, kind: str, place: str) -> Action:
    return Action(kind, place)


#: How often each kind is chosen relative to the others, and the function that makes an action of it.
KINDS: Final[dict[str, tuple[int, Callable[[Random, str, str], Action]]]] = {
    "shrink": (8, _of(_SHRINKS)),
    "compact": (3, _of(_FACTORS)),
    "codec": (2, _setting),
    "recompress": (2, _setting),
    "limits": (4, _setting),
    "pressure": (3, _setting),
    "ahead": (2, _setting),
    "cleaning": (1, _setting),
    "readers": (2, _plain),
    "signals": (4, lambda random, kind, place: Action(kind, place, random.choice(SIGNALS))),
    "commands": (3, _plain),
    "down": (1, _plain),
    "fill": (2, lambda random, kind, place: Action(kind, SMALL, value=random.choice(("0", "2M", "8M")))),
    "free": (3, lambda random, kind, place: Action(kind, SMALL)),
    "rest": (4, _plain),
}


def kinds(only: Collection[str] = (), without: Collection[str] = ()) -> tuple[str, ...]:
    """The kinds to choose from. Raises ValueError for an unknown kind, or if none is left."""
    if unknown := (set(only) | set(without)) - set(KINDS):
        raise ValueError(f"no action {', '.join(sorted(unknown))}: choose from {', '.join(KINDS)}")
    chosen = tuple(kind for kind in KINDS if (not only or kind in only) and kind not in without)
    if not chosen:
        raise ValueError("no action is left: name fewer with --without")
    return chosen


def actions(seed: int, chosen: tuple[str, ...]) -> Iterator[Action]:
    """An endless sequence of actions of the `chosen` kinds, the same for the same seed."""
    random = Random(seed)
    weights = [KINDS[kind][0] for kind in chosen]
    while True:
        [kind] = random.choices(chosen, weights)
        yield KINDS[kind][1](random, kind, random.choice(PLACES))
