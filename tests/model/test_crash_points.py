"""A kill behind any single write: each operation of the store is run once, and whatever it would have left is recovered from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import pytest

from tests.crash_points import CrashPoints, Left, Sequences, copied_tier, store_in_python
from tests.parts import FaultyTier, Regions, page_of
from tmemfs.errors import BackingFull
from tmemfs.pages.reader import Reader
from tmemfs.store.codec import LZ4, ZERO_PAGE, Packed, encode, parse_codec
from tmemfs.store.consistency import check
from tmemfs.store.dictionary import Encoder
from tmemfs.store.merge_plans import Copied, Merge
from tmemfs.store.plans import WriteBack
from tmemfs.store.recompression import Recompression, reencode
from tmemfs.store.tmem import Tmem
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES

SLOTS: Final = 2048
FRAMES: Final = 9
EXTENTS: Final = 9
#: Raw pages of one segment.
FULL: Final = 255
#: Of the points, those after which the recovered store goes on working: it takes ten times as long as to verify it.
GO_ON_STRIDE: Final = 5
LZ4_CODEC = parse_codec("lz4")
DICTIONARY: Final = b"page 1 of a test. page 2 of a test. " * 9


def packed(pages: dict[int, bytes]) -> list[Packed]:
    """The pages, in order of slots."""
    return [encode(pages[slot], LZ4_CODEC) for slot in sorted(pages)]


def run_of(kind: str, first: int, count: int, seed: int) -> dict[int, bytes]:
    """`count` pages from slot `first` on."""
    return {first + number: page_of(kind, seed + number) for number in range(count)}  # type: ignore[arg-type]


class Store:
    """A store over regions, the pages that it has to have, and what is done with both."""

    def __init__(self, regions: Regions, tier: FaultyTier, pages: dict[int, bytes], sequences: Sequences) -> None:
        self.regions, self.tier, self.pages, self.sequences = regions, tier, pages, sequences
        self.tmem: Tmem = regions.start(FRAMES, SLOTS, spare=1, reserve_bytes=SEGMENT_BYTES)
        self.reader = Reader(self.tmem, tier)
        #: What a write to the tier goes through.
        self.write_to_tier: Callable[[int, memoryview, int], None] = self.tier.write  # type: ignore[assignment]

    def store(self, pages: dict[int, bytes]) -> None:
        """Store a run of pages."""
        assert self.tmem.store(min(pages), packed(pages)) == len(pages)
        self.pages |= pages

    def invalidate(self, first: int, count: int) -> None:
        """Forget pages."""
        self.tmem.invalidate(first, count)
        for slot in range(first, first + count):
            self.pages.pop(slot, None)

    def thin_out(self, first: int, count: int, keep: int) -> None:
        """Forget all pages but every `keep`-th."""
        for slot in range(first, first + count):
            if slot % keep:
                self.invalidate(slot, 1)

    def write(self, plan: WriteBack) -> None:
        """Write a segment back, without the commit."""
        self.sequences.write(plan.sequence, plan.data)
        self.write_to_tier(plan.extent, plan.data, plan.sequence)

    def write_back(self) -> bool:
        """Write the next victim back, whether or not it is sparse; False if there is none, or no extent for it."""
        try:
            plan = self.tmem.plan_write_back(include_open=True)
        except BackingFull:
            return False
        if plan is not None:
            self.write(plan)
            self.tmem.commit_write_back(plan)
        return plan is not None

    def copy(self, plan: Merge) -> Copied:
        """Copy what lives, and write it to the tier where it came from there."""
        copied = Copied(plan.into if plan.into is not None else memoryview(bytearray(SEGMENT_BYTES)))
        for source in plan.sources:
            data = source.data
            if data is None:
                data = memoryview(bytearray(source.size_bytes))
                self.tier.read(source.extent, 0, data, source.sequence)
            self.tmem.merges.copy(plan, source, data, copied)
        if plan.extent is not None:
            self.sequences.write(plan.sequence, copied.data)
            self.write_to_tier(plan.extent, copied.data, plan.sequence)
        return copied

    def merge(self, plan: Merge | None) -> None:
        """Perform a merge."""
        if plan is not None:
            self.tmem.merges.commit(plan, self.copy(plan))

    def release(self) -> None:
        """Release the memory of frames."""
        while plan := self.tmem.reclaim.plan_release():
            for frame in plan.frames:
                self.tmem.arena.frame_view(frame)[:] = bytes(SEGMENT_BYTES)
            self.tmem.reclaim.commit_release(plan)

    def punch(self) -> None:
        """Punch the holes of extents."""
        self.tmem.reclaim.punch_again()
        while plan := self.tmem.reclaim.plan_discard():
            self.tier.discard(plan.extents)
            self.tmem.reclaim.commit_discard(plan)

    def verify(self, may_be: dict[int, bytes | None] | None = None) -> None:
        """Every page is as it has to be, or, in a slot of `may_be`, as it says; and the counters are those of a scan."""
        check(self.tmem)
        may_be = may_be or {}
        for first in range(0, SLOTS, 64):
            found = self.reader.perform(self.tmem.plan_read(first, 64))
            for slot, page in enumerate(found, first):
                allowed = [self.pages.get(slot, ZERO_PAGE)]
                if slot in may_be:
                    allowed.append(may_be[slot] or ZERO_PAGE)
                assert page in allowed, f"slot {slot}"
                if slot in may_be:
                    self._take_over(slot, page)

    def _take_over(self, slot: int, page: bytes) -> None:
        """From now on the slot has to have what was found in it."""
        if self.tmem.slots.handles[slot]:
            self.pages[slot] = page
        else:
            self.pages.pop(slot, None)

    def go_on(self) -> None:
        """Store, merge, write back and clean, as if nothing had been."""
        self.release()
        self.punch()
        self.store(run_of("half", 1800, 40, 90_000))
        self.thin_out(1800, 40, 3)
        self.merge(self.tmem.merges.plan_compact())
        while self.write_back():
            self.merge(self.tmem.merges.plan_clean(PAGE_BYTES))
            self.release()
            self.punch()
        self.store(run_of("raw", 1800, 20, 91_000))
        self.verify()
        assert not self.tmem.arena.has_releasing and len(self.tmem.arena.used) <= FRAMES


@pytest.fixture
def store() -> Iterator[Store]:
    """Pages of every kind: on the tier in a full and in two sparse segments; in RAM in sealed and open ones."""
    regions = Regions.new(SLOTS, FRAMES, EXTENTS)
    store = Store(regions, FaultyTier(), {}, Sequences())
    store_in_python(store.tmem)
    store.store(run_of("raw", 0, 2 * FULL, 0))
    store.write_back()
    store.write_back()
    store.thin_out(0, 2 * FULL, 9)
    store.store(run_of("half", 600, 2 * 500, 2000))
    store.thin_out(600, 900, 6)
    store.store(
        run_of("text", 1600, 60, 0) | run_of("raw", 1660, 4, 6000) | run_of("zero", 1664, 2, 0) | run_of("fill", 1666, 2, 0)
    )
    store.verify()
    yield store
    regions.close()


def run_killed(store: Store, operation: Callable[[], object], may_be: dict[int, bytes | None] | None = None) -> int:
    """Run `operation`, and recover from each point of it; `may_be` is what it changes. How many points there were."""
    before, sequences = dict(store.pages), store.sequences

    def at_point() -> None:
        left = Left.by(store.regions, store.tier)
        recovered = Store(left.regions, left.tier, dict(before), sequences.copy())
        assert recovered.tmem.segments.next_sequence > max(sequences.written, default=0)
        recovered.verify(may_be)
        if not points.count % GO_ON_STRIDE:
            recovered.go_on()
        left.forget()

    points = CrashPoints(store.regions, store.tier, at_point)
    store.write_to_tier = points.write
    points.run(operation)
    store.write_to_tier = store.tier.write  # type: ignore[assignment]
    store.verify(may_be)
    store.go_on()
    return points.count


def test_a_kill_in_a_store_leaves_each_page_old_or_new(store: Store) -> None:
    """Over pages in RAM, on the tier and none; the open segments become full within it, and a sealed one empty."""
    new = run_of("raw", 0, 12, 7000) | run_of("half", 12, 12, 7000)
    assert run_killed(store, partial(store.tmem.store, 0, packed(new)), dict(new)) > 50
    fill = run_of("raw", 1700, FULL - 6, 30_000)
    store.store(fill)
    new = run_of("raw", 1700, 6, 40_000)
    assert run_killed(store, partial(store.tmem.store, 1700, packed(new)), dict(new)) > 15


def test_a_kill_in_a_store_that_empties_segments_loses_nothing(store: Store) -> None:
    for slot in sorted(slot for slot in store.pages if slot < 2 * FULL and slot not in (9, 18, 27)):
        store.invalidate(slot, 1)
    new = run_of("zero", 9, 19, 0)
    assert run_killed(store, partial(store.tmem.store, 9, packed(new)), dict(new)) > 19


def test_a_kill_in_an_invalidate_leaves_each_page_old_or_empty(store: Store) -> None:
    """Segments in RAM and on the tier become empty within it."""
    for first, count in ((0, 2 * FULL), (900, 700)):
        gone: dict[int, bytes | None] = {slot: None for slot in range(first, first + count)}
        assert run_killed(store, partial(store.tmem.invalidate, first, count), gone) > 50


def test_a_kill_in_a_write_back_loses_nothing(store: Store) -> None:
    assert run_killed(store, store.write_back) > 5


def test_a_kill_in_a_write_back_that_fails_loses_nothing(store: Store) -> None:
    def fail() -> None:
        plan = store.tmem.plan_write_back(include_open=True)
        assert plan is not None
        store.write(plan)
        store.tmem.abort_write_back(plan)

    assert run_killed(store, fail) > 5


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_kill_in_a_write_back_of_what_is_forgotten_meanwhile_loses_nothing(store: Store, ends_well: bool) -> None:
    def write_what_is_forgotten() -> None:
        plan = store.tmem.plan_write_back(include_open=True)
        assert plan is not None
        store.write(plan)
        store.tmem.invalidate(0, SLOTS)
        (store.tmem.commit_write_back if ends_well else store.tmem.abort_write_back)(plan)

    run_killed(store, write_what_is_forgotten, dict.fromkeys(range(SLOTS)))


@pytest.mark.parametrize("ends", ["commit", "abort", "in vain"])
def test_a_kill_in_a_merge_in_ram_loses_nothing(store: Store, ends: str) -> None:
    """Pages are stored and forgotten between the copy and the commit."""
    changed: dict[int, bytes | None] = {**run_of("half", 606, 3, 50_000), 612: None, 618: None}

    def merge() -> None:
        plan = store.tmem.merges.plan_compact()
        assert plan is not None and plan.extent is None
        copied = store.copy(plan)
        assert len(copied.moves) > 30
        store.tmem.store(606, packed(run_of("half", 606, 3, 50_000)))
        store.tmem.invalidate(612, 1)
        store.tmem.invalidate(618, 1)
        if ends == "commit":
            store.tmem.merges.commit(plan, copied)
        else:
            store.tmem.merges.abort(plan, gains=ends == "abort")

    assert run_killed(store, merge, changed) > 20


def test_a_kill_in_a_merge_before_a_write_back_loses_nothing(store: Store) -> None:
    def merge() -> None:
        plan = store.tmem.plan_merge_before_write(include_open=True)
        assert plan is not None
        store.merge(plan)
        store.write_back()

    assert run_killed(store, merge) > 20


def test_a_kill_in_a_recompression_loses_nothing(store: Store) -> None:
    recompression = Recompression(store.tmem)
    for lane in store.tmem.lanes:
        with store.tmem.lock:
            store.tmem.transitions.seal(lane)
    recompression.look(None)
    store.tmem.segments.loaded[:] = bytes(len(store.tmem.segments.loaded))  # by `verify`; what is loaded from is not idle
    encoder = Encoder(store.tmem.dictionaries.add(DICTIONARY), 1)

    def recompress() -> None:
        plan = recompression.plan(recompression.look(encoder), encoder)
        assert plan is not None
        copied = store.tmem.merges.copy_in_ram(plan, recode=partial(reencode, encoder))
        assert copied.moves and any(old & 7 == LZ4 != new & 7 for _, old, new in copied.moves)
        store.tmem.merges.commit(plan, copied)
        store.write_back()

    assert run_killed(store, recompress) > 20


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_kill_in_a_cleaning_loses_nothing(store: Store, ends_well: bool) -> None:
    changed: dict[int, bytes | None] = {**run_of("raw", 18, 1, 60_000), 27: None}

    def clean() -> None:
        plan = store.tmem.merges.plan_clean(PAGE_BYTES)
        assert plan is not None and plan.extent is not None
        copied = store.copy(plan)
        store.tmem.store(18, packed(run_of("raw", 18, 1, 60_000)))
        store.tmem.invalidate(27, 1)
        if ends_well:
            store.tmem.merges.commit(plan, copied)
        else:
            store.tmem.merges.abort(plan)

    assert run_killed(store, clean, changed) > 10


def test_a_kill_while_memory_and_disk_are_given_back_loses_nothing(store: Store) -> None:
    while store.write_back():
        pass
    store.invalidate(0, 2 * FULL)
    assert store.tmem.arena.has_releasing and store.tmem.extents.has_retired

    def give_back() -> None:
        store.release()
        store.punch()
        store.tmem.limit_pool(4 * SEGMENT_BYTES)

    run_killed(store, give_back)


def test_a_kill_in_a_recovery_loses_nothing(store: Store) -> None:
    """The one before left segments being written, merged and filled, and one that is empty."""
    write_back = store.tmem.plan_write_back(include_open=True)
    assert write_back is not None
    store.tmem.merges.plan_compact()
    for slot in [slot for slot in store.pages if slot < 2 * FULL]:
        store.tmem.slots.handles[slot] = 0  # as an invalidate leaves it that is killed before the segment is freed
        del store.pages[slot]

    def recover() -> None:
        store.tmem = store.regions.start(FRAMES, SLOTS, spare=1, reserve_bytes=SEGMENT_BYTES)
        store.reader = Reader(store.tmem, store.tier)

    assert run_killed(store, recover) > 4


def test_what_is_written_twice_under_one_sequence_is_noticed() -> None:
    sequences = Sequences()
    sequences.write(1, memoryview(b"one content"))
    sequences.write(1, memoryview(b"one content"))
    sequences.write(2, memoryview(b"one content"))
    with pytest.raises(AssertionError, match="sequence 1 was used for two contents"):
        sequences.write(1, memoryview(b"another content"))


def test_a_copied_tier_is_left_alone() -> None:
    tier = FaultyTier()
    tier.write(0, memoryview(b"here"), 1)  # type: ignore[arg-type]
    copied_tier(tier).discard((0,))  # type: ignore[arg-type]
    assert tier.inner.extents == {0: b"here"}
