"""Drives a store, without a mount and without a disk: stores, loads, write-backs and cleanings, each page checked.

Pages are real ones (tmemfs/cli/real_pages.py), encoded once, so that the store is measured and not its codec. The pool may
hold an eighth of the live set. The tier is memory, unless another is given. Every LOAD_EACH-th operation also loads a page; at the
end every page is loaded.
"""

from __future__ import annotations

import mmap
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Final

from tmemfs.cli.real_pages import RealPages
from tmemfs.errors import BackingFull, TierError
from tmemfs.pages.reader import Reader
from tmemfs.store.codec import ZERO_PAGE, Packed, encode, parse_codec
from tmemfs.store.consistency import check
from tmemfs.store.extents import CLEANING_RESERVE_BYTES, Extents
from tmemfs.store.frames import SPARE_FRAMES, Arena
from tmemfs.store.merge_plans import Copied, Merge
from tmemfs.store.segments import SegmentTable
from tmemfs.store.slots import SlotTable
from tmemfs.store.tmem import Tmem
from tmemfs.tiers.tier import Extent, Tier
from tmemfs.units import PAGE_BYTES, SECTOR_BYTES, SEGMENT_BYTES
from tools.churn.workloads import Operation

CONTENTS: Final = 4093
POOL_SHARE: Final = 0.125
LOAD_EACH: Final = 20
_POINTS: Final = 50
_SEED: Final = 1


@dataclass(frozen=True, slots=True)
class Point:
    """One reading: operations so far, and since the last reading the bytes stored, written back and cleaned, and the CPU time."""

    operations: int
    stored: int
    written: int
    cleaned: int
    cpu_s: float
    space_amplification: float


class MemorySegments:
    """A tier of whole segments in memory."""

    name = "memory"
    capacity_bytes = 1 << 50
    most_extents: int | None = None
    sector_bytes = SECTOR_BYTES
    can_discard = True
    is_encrypted = False

    def __init__(self) -> None:
        self._extents: dict[Extent, bytes] = {}

    def write(self, extent: Extent, data: memoryview, sequence: int, for_cleaning: bool = False) -> None:
        """Keep a copy."""
        self._extents[extent] = bytes(data)

    def read(self, extent: Extent, offset: int, into: memoryview, sequence: int) -> None:
        """Copy from it."""
        into[:] = self._extents[extent][offset : offset + len(into)]

    def discard(self, extents: tuple[Extent, ...]) -> None:
        """Drop the copies."""
        for extent in extents:
            self._extents.pop(extent, None)

    def close(self) -> None:
        """Drop all copies."""
        self._extents.clear()


class Drive:
    """A store of `slots` slots whose live set is `utilisation` of the tier; `score` ranks the cleaner's victims."""

    def __init__(self, slots: int, utilisation: float, score: Callable[[float, float], float], tier: Tier | None = None) -> None:
        supply = RealPages(_SEED)
        self._pages = [supply.page(number) for number in range(CONTENTS)]
        self._packed: list[Packed] = [encode(page, parse_codec("lz4")) for page in self._pages]
        # a record has a header of 12 bytes, and 2 bytes of padding on average
        live = slots * sum(len(payload) + 14 for _, payload in self._packed) // CONTENTS
        frames = max(int(live * POOL_SHARE) // SEGMENT_BYTES, 12)
        tier_bytes = max(int((live - frames * SEGMENT_BYTES) / utilisation), 16 * SEGMENT_BYTES)
        # twice as many numbers as extents fit: cleaning writes new ones before it frees old ones
        extents = tier_bytes // SEGMENT_BYTES
        self.tmem = Tmem(
            SlotTable(slots),
            SegmentTable(frames + 2 * extents),
            Arena(frames, frames, spare=SPARE_FRAMES),
            Extents(2 * extents, tier_bytes + CLEANING_RESERVE_BYTES, CLEANING_RESERVE_BYTES),
            score=score,
        )
        self.tier: Tier = tier or MemorySegments()
        self.slots = slots
        self._reader = Reader(self.tmem, self.tier)
        self._random = Random(_SEED)
        self._model = array("h", [-1]) * slots
        self._into, self._from = (memoryview(mmap.mmap(-1, SEGMENT_BYTES)) for _ in range(2))
        self._written = 0
        self._next = 0
        self._before = (0, 0, 0)
        self._cpu_s = time.process_time()

    def fill(self) -> None:
        """Store every slot once."""
        for slot in range(0, self.slots, 32):
            self._store(slot, min(32, self.slots - slot))

    def run(self, operations: Iterator[Operation], count: int) -> list[Point]:
        """Perform `count` page operations, with a reading after each fiftieth of them."""
        points, done, step = [], 0, max(count // _POINTS, 1)
        self._reading(0)
        while done < count:
            kind, first, pages = next(operations)
            self._store(first, pages) if kind == "store" else self._discard(first, pages)
            if not (done // LOAD_EACH) % 2 and done % LOAD_EACH < pages:
                self._load(self._random.randrange(self.slots))
            if (done + pages) // step > done // step:
                points.append(self._reading(done + pages))
            done += pages
        return points

    def verify(self) -> None:
        """Load every page, and compare the store's sums with a scan."""
        for slot in range(self.slots):
            self._load(slot)
        check(self.tmem)

    def verify_some(self, pages: int) -> None:
        """Load some pages, chosen at random."""
        for _ in range(pages):
            self._load(self._random.randrange(self.slots))

    def compact(self) -> float:
        """Clean until nothing more is gained; returns the space amplification of the tier."""
        while self._clean(PAGE_BYTES):
            pass
        return self.tmem.merges.space().amplification

    def _store(self, first: int, count: int) -> None:
        numbers = [(self._next + at) % CONTENTS for at in range(count)]
        self._next += count
        packed, stored = [self._packed[number] for number in numbers], 0
        while (stored := self.tmem.store(first, packed, stored)) < count:
            self._free_frames()
        self._model[first : first + count] = array("h", numbers)

    def _discard(self, first: int, count: int) -> None:
        self.tmem.invalidate(first, count)
        self._model[first : first + count] = array("h", [-1]) * count

    def _load(self, slot: int) -> None:
        page = self.tmem.load(slot)
        if page is None:
            [page] = self._reader.perform(self.tmem.plan_read(slot, 1))
        number = self._model[slot]
        if page != (self._pages[number] if number >= 0 else ZERO_PAGE):
            raise SystemExit(f"bug in tmemfs: slot {slot} came back wrong; please report it")

    def _free_frames(self) -> None:
        """What the shrinker and the cleaner do when the pool is full."""
        # the tier first: a write-back needs a free extent
        while self.tmem.merges.space().free < SEGMENT_BYTES and self._clean():
            pass
        try:
            if merge := self.tmem.plan_merge_before_write(include_open=True):
                assert merge.into is not None
                self._merge(merge, Copied(merge.into))
            elif plan := self.tmem.plan_write_back(include_open=True):
                self._write(plan.extent, plan.data, plan.sequence)
                self.tmem.commit_write_back(plan)
        except BackingFull:
            # the least gain that is a gain at all, as the store does it when its tier is full
            if not self._clean(PAGE_BYTES):
                raise SystemExit("the tier is full of live pages: give a lower utilisation") from None
            return
        while release := self.tmem.reclaim.plan_release():
            self.tmem.reclaim.commit_release(release)

    def _clean(self, least_gain_bytes: int = SEGMENT_BYTES // 32) -> bool:
        plan = self.tmem.merges.plan_clean(least_gain_bytes)
        if plan is None:
            return False
        self._merge(plan, Copied(self._into))
        while discard := self.tmem.reclaim.plan_discard():
            self.tier.discard(discard.extents)
            self.tmem.reclaim.commit_discard(discard)
        return True

    def _merge(self, plan: Merge, copied: Copied) -> None:
        for source in plan.sources:
            data = source.data
            if data is None:
                data = self._from[: source.size_bytes]
                self.tier.read(source.extent, 0, data, source.sequence)
            self.tmem.merges.copy(plan, source, data, copied)
        if copied.damaged:
            raise TierError("bug in tmemfs: a record was damaged in memory; please report it")
        if plan.extent is not None:
            self._write(plan.extent, copied.data, plan.sequence, for_cleaning=True)
        self.tmem.merges.commit(plan, copied)

    def _write(self, extent: Extent, data: memoryview, sequence: int, for_cleaning: bool = False) -> None:
        self.tier.write(extent, data, sequence, for_cleaning)
        self._written += len(data)

    def _reading(self, operations: int) -> Point:
        """What has been done since the last reading."""
        cleaned = self.tmem.merges.counts.cleaned_bytes
        now = (self.tmem.counts.stored_bytes, self._written - cleaned, cleaned)
        stored, written, cleaned = (new - old for new, old in zip(now, self._before, strict=True))
        cpu_s, self._before, self._cpu_s = time.process_time() - self._cpu_s, now, time.process_time()
        return Point(operations, stored, written, cleaned, cpu_s, self.tmem.merges.space().amplification)
