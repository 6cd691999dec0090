"""What a soak did and counted, and what went wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

#: By how much the anonymous memory of a daemon may grow after the first quarter of its life: contexts of codecs that were not
#: chosen before, and what the heap keeps of open files.
FLAT_BYTES: Final = 8 << 20
#: A shorter life, in seconds, says nothing about growth.
_LEAST_LIFE_S: Final = 60.0
_LEAST_SAMPLES: Final = 3
#: Shares of its life. Nothing is sampled in the last verification of the hogs, which takes a good part of a short soak.
_EARLY: Final = (0.15, 0.35)
_LATE: Final = (0.7, 1.0)
#: Figures of the two daemons that are added up.
STAT_KEYS: Final = ("stores", "loads_ram", "loads_disk", "invalidates", "pages_written", "cleanings", "recompressed_records")
EVENT_KEYS: Final = ("stores_refused", "write_errors", "read_errors", "corrupt_records", "discard_errors")


@dataclass(slots=True)
class Summary:
    """Counts of one soak. `faults` is empty if it passed."""

    seed: int
    actions: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    hogs: Counter[str] = field(default_factory=Counter)
    daemons: Counter[str] = field(default_factory=Counter)
    memory: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def daemon_ends(self, stat: dict[str, str], events: dict[str, str]) -> None:
        """Add what a daemon counted."""
        for source, keys in ((stat, STAT_KEYS), (events, EVENT_KEYS)):
            self.daemons.update({key: int(source[key]) for key in keys if key in source})

    def lines(self) -> list[str]:
        """The summary as lines to print."""
        return [
            f"soak of {self.seconds:.0f} s, seed {self.seed}: {'FAILED' if self.faults else 'passed'}",
            _line("actions", self.actions),
            _line("answers", self.answers),
            _line("hogs", self.hogs),
            _line("daemons", self.daemons),
            _line("states", self.states),
            *(f"memory of {name}: {text}" for name, text in sorted(self.memory.items())),
            *(f"FAULT: {fault}" for fault in self.faults),
        ]


def _line(name: str, counts: Counter[str]) -> str:
    return f"{name}: " + (", ".join(f"{key} {count}" for key, count in sorted(counts.items())) or "none")


@dataclass(slots=True)
class Growth:
    """The anonymous memory of one daemon, sampled over its life."""

    pid: int
    samples: list[tuple[float, int]] = field(default_factory=list)

    def sample(self, at_s: float, anon_bytes: int) -> None:
        """Note its memory of now."""
        self.samples.append((at_s, anon_bytes))

    def judge(self) -> tuple[str, bool]:
        """Its memory early and late, and whether that is flat; a life that is too short to tell counts as flat."""
        early, late = self._within(*_EARLY), self._within(*_LATE)
        if (
            not self.samples
            or self.samples[-1][0] - self.samples[0][0] < _LEAST_LIFE_S
            or min(len(early), len(late)) < _LEAST_SAMPLES
        ):
            return "too short a life to tell", True
        before, after = median(early), median(late)
        text = f"{before / 1e6:.1f} MB after a quarter of its life, {after / 1e6:.1f} MB at the end"
        return f"{text} (it may grow by {FLAT_BYTES / 1e6:.1f} MB)", after - before <= FLAT_BYTES

    def _within(self, first: float, last: float) -> Sequence[int]:
        if not self.samples:
            return []
        began, ended = self.samples[0][0], self.samples[-1][0]
        length = ended - began
        return [anon for at, anon in self.samples if began + first * length <= at <= began + last * length]
