"""Crash points: the state that a process killed behind any single write of an operation would leave, and a check of each of them.

The store in Python is traced line by line, while an operation runs. Whenever a line has changed the slots or the segments, and at
the lines that write records, the process might have been killed there. What it would leave are the regions and the tier as they are
at that moment, of which `Left.by` makes a copy that shares memory until it is written to. A write to the tier has three such
points: nothing, half and all of it is there.

Lines are the steps of the store in Python. Its compiled parts are stepped through one by one instruction in test_single_steps.py.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

from xxhash import xxh3_64_intdigest

import tmemfs
from tests.parts import FaultyTier, Regions
from tmemfs.store.append import Appender
from tmemfs.store.region import Region
from tmemfs.store.slots import SLOT_BYTES
from tmemfs.store.tmem import Tmem
from tmemfs.tiers.in_memory import MemoryTier

_STORE: Final = str(Path(tmemfs.__file__).parent / "store")
#: Functions that write to the arena. They write nowhere else, so comparing the arena itself is not needed.
_WRITERS: Final = frozenset(("write_record", "mark_gap"))
#: Merges write hundreds of records, all alike. The first lines are points, of the others every 61st.
_FIRST_LINES: Final = 9
_LINE_STRIDE: Final = 61


class CopiedRegion(Region):
    """What a region holds now, to be written to without changing it."""

    def __init__(self, region: Region) -> None:
        self.name, self.size_bytes, self.fd = region.name, region.size_bytes, region.fd
        self.map = mmap.mmap(region.fd, region.size_bytes, mmap.MAP_PRIVATE)
        self.view = memoryview(self.map)

    def close(self) -> None:
        """The descriptor is that of the original."""


@dataclass(frozen=True, slots=True)
class Left:
    """What a process that was killed leaves."""

    regions: Regions
    tier: FaultyTier

    @classmethod
    def by(cls, regions: Regions, tier: FaultyTier) -> Left:
        """A copy of what is there now, good until the regions are written to."""
        slots, segments, arena = (CopiedRegion(region) for region in (regions.slots, regions.segments, regions.arena))
        return cls(Regions(slots, segments, arena, regions.frames, regions.extents), copied_tier(tier))

    @classmethod
    def to_stay(cls, regions: Regions, tier: FaultyTier) -> Left:
        """A copy with memory of its own."""
        copies = Regions.new(regions.slots.size_bytes // SLOT_BYTES, regions.frames, regions.extents)
        copies.slots.view[:], copies.segments.view[:] = regions.slots.view, regions.segments.view
        copies.arena.view[:] = regions.arena.view
        return cls(copies, copied_tier(tier))

    def forget(self) -> None:
        """Give back the memory of what was written to a copy of `by`, which is not to be used any more."""
        # Stores have references in circles, and the collector does not know how large the regions are that hang on them.
        for region in (self.regions.slots, self.regions.segments, self.regions.arena):
            region.map.madvise(mmap.MADV_DONTNEED)


def copied_tier(tier: FaultyTier) -> FaultyTier:
    """A tier with the same contents."""
    inner = MemoryTier(tier.inner.capacity_bytes)
    inner.extents.update(tier.inner.extents)
    return FaultyTier(inner)


@dataclass(slots=True)
class Sequences:
    """What was written to the tier under each sequence number: never two things, as a cipher may take the number for its nonce."""

    written: dict[int, int] = field(default_factory=dict)

    def write(self, sequence: int, data: memoryview) -> None:
        """`data`, or the beginning of it, is written under `sequence`."""
        now = xxh3_64_intdigest(data)
        assert self.written.setdefault(sequence, now) == now, f"sequence {sequence} was used for two contents"

    def copy(self) -> Sequences:
        """The same, for what might have happened next."""
        return Sequences(dict(self.written))


def store_in_python(tmem: Tmem) -> None:
    """Have `tmem` append pages in Python."""
    tmem._appender = Appender(tmem.slots, tmem.transitions)


class CrashPoints:
    """Calls `at_point` at each crash point of what is `run` over `regions` and `tier`."""

    def __init__(self, regions: Regions, tier: FaultyTier, at_point: Callable[[], None]) -> None:
        self.count = 0
        self._regions = regions
        self._tier = tier
        self._at_point = at_point
        self._seen = b""
        self._record_lines = 0

    def run(self, operation: Callable[[], object]) -> None:
        """Run it. Its last point is its end."""
        self._seen = self._tables()
        previous = sys.gettrace()
        sys.settrace(self._enter)
        try:
            operation()
        finally:
            sys.settrace(previous)
        self._meet()

    def write(self, extent: Any, data: memoryview, sequence: int) -> None:
        """Write to the tier, piece by piece."""
        previous = sys.gettrace()
        sys.settrace(None)
        for length in (0, len(data) // 2, len(data)):
            if length:
                self._tier.write(extent, data[:length], sequence)
            self._meet()
        sys.settrace(previous)

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._step if frame.f_code.co_filename.startswith(_STORE) else None

    def _step(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_name in _WRITERS:
            self._record_lines += 1
            if self._record_lines <= _FIRST_LINES or not self._record_lines % _LINE_STRIDE:
                self._meet()
        elif self._tables() != self._seen:
            self._meet()
        return self._step

    def _tables(self) -> bytes:
        return bytes(self._regions.slots.view) + bytes(self._regions.segments.view)

    def _meet(self) -> None:
        self._seen = self._tables()
        self.count += 1
        self._at_point()
