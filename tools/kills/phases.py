"""What a worker is doing when it dies: how to have it do that, and the counters of control/stat that move meanwhile. Pure.

A phase is seen when one of its counters differs between two looks that are some milliseconds apart; the signal is sent at once.
Nobody can stop a worker between two chosen instructions from outside: the model of the store does that for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Phase:
    """`begin`: names and values of control files that are written first; `moves`: keys of stat."""

    name: str
    begin: tuple[tuple[str, str], ...] = ()
    moves: tuple[str, ...] = ()

    def is_seen(self, before: Mapping[str, str], now: Mapping[str, str]) -> bool:
        """Whether a counter of it has grown from `before` to `now`."""
        return any(int(now.get(key, "0")) > int(before.get(key, "0")) for key in self.moves)


#: A request for as much merging as possible, in RAM first and then on disk.
_COMPACT: Final = ("compact", "1.005 deadline=3s")
ANY: Final = Phase("any moment")
RECOVERING: Final = Phase("recovering")
PHASES: Final = (
    ANY,
    Phase("writing back", (("shrink", "24M"),), ("pages_written",)),
    Phase("writing ahead", (("writeahead.rest", "0"), ("writeahead", "90")), ("bytes_written_ahead",)),
    Phase("merging in RAM", (_COMPACT,), ("compactions",)),
    Phase("cleaning the disk", (("clean.rate", "64M"), _COMPACT), ("cleanings", "cleaned_bytes")),
    # it needs free frames; a change of the level has it look at once, and what rests since the look before is idle
    Phase(
        "recompressing",
        (("pool.max", "128M"), ("recompress", "zstd:1"), ("recompress", "zstd:2")),
        ("recompressed_records", "recompressions_not_worth"),
    ),
    Phase("shrinking to a limit", (("pool.max", "20M"), ("pool.max", "{pool_max}")), ("bytes_released",)),
    RECOVERING,
)
