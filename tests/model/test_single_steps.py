"""A kill between any two instructions of the store as it is run, its compiled parts included, stepped through as by a debugger.

What matters of the regions between two instructions is their tables: what lies in the arena has no meaning before a word of a table
says so. So each state of the tables that there was is recovered from, and every page read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import pytest

from tests.crash_points import Left
from tests.parts import FaultyTier, Regions, copy_for, page_of
from tests.single_step import single_step
from tmemfs.pages.reader import Reader
from tmemfs.store.codec import ZERO_PAGE, encode, parse_codec
from tmemfs.store.consistency import check
from tmemfs.store.region import Region
from tmemfs.store.segments import LANE_PACKED
from tmemfs.store.tmem import Tmem
from tmemfs.tiers.in_memory import MemoryTier
from tmemfs.tiers.tier import Extent
from tmemfs.units import SEGMENT_BYTES

pytestmark = pytest.mark.compiled

SLOTS: Final = 512
FRAMES: Final = 8
EXTENTS: Final = 5
#: Raw pages of one segment.
FULL: Final = 255
#: Slots whose pages are in RAM; those before are on the tier.
IN_RAM: Final = 256
LZ4_CODEC = parse_codec("lz4")

Pages = dict[int, bytes]


class SharedTier(FaultyTier):
    """A tier whose extents lie in a region, so that what a child has written to it is seen by its parent."""

    def __init__(self, region: Region) -> None:
        super().__init__()
        self.region = region

    def write(self, extent: Extent, data: memoryview, sequence: int, for_cleaning: bool = False) -> None:
        """Write."""
        at = extent * SEGMENT_BYTES
        self.region.view[at : at + len(data)] = data

    def contents(self) -> FaultyTier:
        """What it holds now."""
        inner = MemoryTier(EXTENTS * SEGMENT_BYTES)
        for extent in range(EXTENTS):
            inner.extents[Extent(extent)] = bytes(self.region.view[extent * SEGMENT_BYTES : (extent + 1) * SEGMENT_BYTES])
        return FaultyTier(inner)


class Place:
    """Regions with pages on the tier and in RAM, in segments of which some are sparse."""

    def __init__(self) -> None:
        self.regions = Regions.new(SLOTS, FRAMES, EXTENTS)
        self.tier = SharedTier(Region("tier", EXTENTS * SEGMENT_BYTES))
        self.pages: Pages = {}
        self.points = 0
        self._tables = b""
        tmem = self.start()
        self.store(tmem, "raw", 0, FULL)
        self.write_back(tmem)
        self.store(tmem, "raw", IN_RAM, FULL)
        self.store(tmem, "half", 0, 2)  # two of those on the tier are dead

    def start(self) -> Tmem:
        """A store over the regions."""
        return self.regions.start(FRAMES, SLOTS, spare=1)

    def store(self, tmem: Tmem, kind: str, first: int, count: int, seed: int = 0) -> None:
        """Store pages."""
        pages = {first + number: page_of(kind, seed + number) for number in range(count)}  # type: ignore[arg-type]
        assert tmem.store(first, [encode(page, LZ4_CODEC) for page in pages.values()]) == count
        self.pages |= pages

    def write_back(self, tmem: Tmem) -> None:
        """Write the next victim back."""
        plan = tmem.plan_write_back(include_open=True)
        assert plan is not None
        self.tier.write(plan.extent, plan.data, plan.sequence)
        tmem.commit_write_back(plan)

    def step_through(self, prepare: Callable[[Tmem], Callable[[], object]], may_be: Pages) -> int:
        """Run in a child what `prepare` returns, and recover from each state of the tables; how many instructions there were."""
        self._tables = self._now()
        steps = single_step(lambda: prepare(self.start()), lambda: self._look(may_be))
        self.verify(may_be)
        return steps

    def _now(self) -> bytes:
        return bytes(self.regions.slots.view) + bytes(self.regions.segments.view)

    def _look(self, may_be: Pages) -> None:
        now = self._now()
        if now != self._tables:
            self._tables = now
            self.points += 1
            self.verify(may_be)

    def verify(self, may_be: Pages) -> None:
        """Recover from what is there now: each page is as it was, or as in `may_be`; and that store can be stored to."""
        left = Left.by(self.regions, self.tier.contents())
        tmem = left.regions.start(FRAMES, SLOTS, spare=1)
        check(tmem)
        found = Reader(tmem, left.tier).perform(tmem.plan_read(0, SLOTS))
        for slot, page in enumerate(found):
            assert page in (self.pages.get(slot, ZERO_PAGE), may_be.get(slot)), f"slot {slot}"
        assert tmem.store(SLOTS - 1, [encode(page_of("half", 1), LZ4_CODEC)]) == 1
        check(tmem)
        left.forget()

    def close(self) -> None:
        """Close what is open."""
        self.regions.close()
        self.tier.region.close()


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.close()


def test_a_store_can_be_killed_between_any_two_instructions(place: Place) -> None:
    """Of pages that are in RAM, on the tier and nowhere; the second of them opens a segment."""
    new = {3: page_of("half", 100), 4: page_of("raw", 101), 5: page_of("fill", 102), 6: page_of("zero", 0)}
    new |= {IN_RAM + FULL: page_of("half", 103)}
    packed = {slot: encode(page, LZ4_CODEC) for slot, page in new.items()}

    def prepare(tmem: Tmem) -> Callable[[], object]:
        def store() -> None:
            tmem.store(3, [packed[slot] for slot in range(3, 7)])
            tmem.store(IN_RAM + FULL, [packed[IN_RAM + FULL]])

        return store

    steps = place.step_through(prepare, new)
    # Two segments are opened, by three words each; each record has its fill, each page its handle.
    assert steps > 1000 and place.points >= 2 * 3 + 4 + 5


def test_a_write_back_can_be_killed_between_any_two_instructions(place: Place) -> None:
    def prepare(tmem: Tmem) -> Callable[[], object]:
        def write_back() -> None:
            plan = tmem.plan_write_back(include_open=True)
            assert plan is not None
            place.tier.write(plan.extent, plan.data, plan.sequence)
            tmem.commit_write_back(plan)

        return write_back

    assert place.step_through(prepare, {}) > 1000
    assert place.points >= 3  # an extent more was taken; the segment is being written; it is on the tier


def test_a_write_back_that_fails_can_be_killed_between_any_two_instructions(place: Place) -> None:
    def prepare(tmem: Tmem) -> Callable[[], object]:
        def write_back() -> None:
            plan = tmem.plan_write_back(include_open=True)
            assert plan is not None
            place.tier.write(plan.extent, plan.data[: len(plan.data) // 2], plan.sequence)
            tmem.abort_write_back(plan)

        return write_back

    assert place.step_through(prepare, {}) > 1000
    assert place.points >= 3


def test_a_merge_can_be_killed_between_any_two_instructions(place: Place) -> None:
    """Of three segments that were sealed early, so that they are sparse, while one of the pages is stored again."""
    tmem = place.start()
    for seed in (0, 50):
        # One page each: a record takes 70,000 instructions, of which two write to a table.
        place.store(tmem, "text", 300 + seed, 1, seed)
        with tmem.lock:
            tmem.transitions.seal(tmem.lanes[LANE_PACKED])
    again = {300: page_of("text", 900)}
    packed = [encode(page, LZ4_CODEC) for page in again.values()]

    def prepare(tmem: Tmem) -> Callable[[], object]:
        def merge() -> None:
            plan = tmem.merges.plan_compact()
            assert plan is not None
            copied = copy_for(tmem, plan, place.tier)
            tmem.store(min(again), packed)
            tmem.merges.commit(plan, copied)

        return merge

    place.step_through(prepare, again)
    # Three sources, the target, its fill, what is stored again, three handles, the sources and the target.
    assert place.points >= 3 + 3 + 1 + 5 + 3 + 3 + 1


def test_an_invalidate_can_be_killed_between_any_two_instructions(place: Place) -> None:
    """It empties a segment in RAM."""

    def prepare(tmem: Tmem) -> Callable[[], object]:
        return lambda: tmem.invalidate(0, 4)

    gone = dict.fromkeys(range(4), ZERO_PAGE)
    place.step_through(prepare, gone)
    assert place.points >= 4 + 1
