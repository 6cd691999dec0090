"""The store against a dict: every operation, plan and commit as separate steps, crashes in between, checked after each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.crash_points import CrashPoints, Left, Sequences, store_in_python
from tests.examples import FACTOR
from tests.parts import KINDS, FaultyTier, Kind, Regions, copy_for, merge, page_of
from tmemfs.errors import BackingFull, TierError
from tmemfs.pages.reader import Reader
from tmemfs.store.codec import ZERO_PAGE, encode, encode_pages, parse_codec
from tmemfs.store.consistency import check
from tmemfs.store.dictionary import Encoder
from tmemfs.store.merge_plans import Copied, Merge
from tmemfs.store.plans import Discard, Populate, ReadPlan, Release, WriteBack
from tmemfs.store.recompression import Recompression, reencode
from tmemfs.store.statistics import statistics
from tmemfs.store.tmem import Tmem
from tmemfs.system.key import Key
from tmemfs.tiers.encrypted import EncryptedTier
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES

SLOTS: Final = 3000
FRAMES: Final = 10
EXTENTS: Final = 8
SLOT = st.integers(0, SLOTS - 1)
CODEC = st.sampled_from(["lz4", "zstd:1", "none"])
SEED = st.integers(0, 1 << 20)
WHICH = st.integers(0, 99)
POINT = st.integers(1, 60)
DICTIONARY = st.sampled_from([b"", b"page 1 of a test. page 2 of a test. " * 9, bytes(range(256)) * 16])


class _Killed(Exception):
    """The process was killed here."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """A read under way and what it has to give: the pages as they were when it was planned."""

    plan: ReadPlan
    expected: list[bytes]


class TmemMachine(RuleBasedStateMachine):
    """Pages by slot, and the plans that are under way."""

    def __init__(self) -> None:
        super().__init__()
        self.pages: dict[int, bytes] = {}
        self.faulty = FaultyTier()
        self.key = Key.create()
        self.sequences = Sequences()
        self.regions = Regions.new(SLOTS, FRAMES, EXTENTS)
        self.limit = 6

    @initialize()
    def start(self) -> None:
        """Start a store; also after a crash, from the same regions."""
        self.tmem: Tmem = self.regions.start(self.limit, SLOTS, spare=1, reserve_bytes=SEGMENT_BYTES)
        self.tier = EncryptedTier(self.faulty, self.key)
        self.reader = Reader(self.tmem, self.tier)
        self.write_backs: list[WriteBack] = []
        self.readings: list[_Reading] = []
        self.releases: list[Release] = []
        self.discards: list[Discard] = []
        self.populates: list[Populate] = []
        self.merges: list[Merge] = []
        self.copied: list[tuple[Merge, Copied]] = []

    @rule(first=SLOT, count=st.integers(1, 800), kind=st.sampled_from((*KINDS, "raw")), seed=SEED, codec=CODEC)
    def store(self, first: int, count: int, kind: Kind, seed: int, codec: str) -> None:
        """Store a run of pages; what finds no free frame is as it was."""
        pages = [page_of(kind, seed + number) for number in range(min(count, SLOTS - first))]
        packed = encode_pages(memoryview(b"".join(pages)), parse_codec(codec))
        stored = self.tmem.store(first, packed)
        for number in range(stored):
            self.pages[first + number] = pages[number]
        if stored < len(pages):
            assert not self.tmem.arena.has_free_frame

    @rule(slot=SLOT, kind=st.sampled_from(KINDS), seed=SEED)
    def store_if_unchanged(self, slot: int, kind: Kind, seed: int) -> None:
        """A store with the version of now succeeds; one with an older version does not."""
        version = self.tmem.version(slot)
        page = page_of(kind, seed)
        if self.tmem.store_if(slot, version, encode(page, parse_codec("lz4"))):
            self.pages[slot] = page
            if self.tmem.version(slot) != version:
                assert self.tmem.store_if(slot, version, encode(page, parse_codec("none"))) is False

    @rule(first=SLOT, count=st.integers(1, 2000))
    def invalidate(self, first: int, count: int) -> None:
        """Forget a run of pages."""
        end = min(first + count, SLOTS)
        self.tmem.invalidate(first, end - first)
        for slot in range(first, end):
            self.pages.pop(slot, None)

    @rule(first=SLOT, left=st.integers(1, 7))
    def thin_out(self, first: int, left: int) -> None:
        """Forget `left` of every eight pages: segments become sparse."""
        for slot in range(first, min(first + 2000, SLOTS)):
            if slot % 8 < left:
                self.tmem.invalidate(slot, 1)
                self.pages.pop(slot, None)

    @rule(first=SLOT, count=st.integers(1, 8))
    def load(self, first: int, count: int) -> None:
        """Load pages from wherever they are."""
        count = min(count, SLOTS - first)
        assert self.reader.perform(self.tmem.plan_read(first, count)) == self._expected(first, count)

    @rule(slot=SLOT)
    def load_one(self, slot: int) -> None:
        """Load one page as the page path does."""
        page = self.tmem.load(slot)
        if page is None:
            page = self.reader.load(slot)
        assert [page] == self._expected(slot, 1)

    @rule(first=SLOT, count=st.integers(1, 8))
    def plan_read(self, first: int, count: int) -> None:
        """Begin a read."""
        count = min(count, SLOTS - first)
        self.readings.append(_Reading(self.tmem.plan_read(first, count), self._expected(first, count)))

    @precondition(lambda self: self.readings)
    @rule(which=WHICH)
    def commit_read(self, which: int) -> None:
        """Finish a read: whatever happened since, it returns the pages of its beginning."""
        reading = self.readings.pop(which % len(self.readings))
        assert self.reader.perform(reading.plan) == reading.expected

    @precondition(lambda self: self.readings)
    @rule(which=WHICH)
    def fail_read(self, which: int) -> None:
        """The tier fails during a read."""
        reading = self.readings.pop(which % len(self.readings))
        self.faulty.fail("read")
        try:
            if reading.plan.records:
                with pytest.raises(TierError):
                    self.reader.perform(reading.plan)
            else:
                assert self.reader.perform(reading.plan) == reading.expected
        finally:
            self.faulty.fail()

    @rule(include_open=st.booleans())
    def plan_write_back(self, include_open: bool) -> None:
        """Begin to write a segment back."""
        if plan := self._next_write_back(include_open):
            assert len(plan.data) <= SEGMENT_BYTES and len(plan.data) % PAGE_BYTES == 0
            self.write_backs.append(plan)

    @precondition(lambda self: self.write_backs)
    @rule(which=WHICH)
    def commit_write_back(self, which: int) -> None:
        """The write succeeds."""
        plan = self.write_backs.pop(which % len(self.write_backs))
        self._write(plan)
        self.tmem.commit_write_back(plan)

    @rule(youngest=st.integers(0, 40))
    def plan_write_ahead(self, youngest: int) -> None:
        """Begin to write a segment ahead of need."""
        if plan := self.tmem.plan_write_ahead(youngest):
            assert self.tmem.segments.age(plan.segment) <= youngest
            self.write_backs.append(plan)

    @precondition(lambda self: self.write_backs)
    @rule(which=WHICH)
    def commit_write_ahead(self, which: int) -> None:
        """The write succeeds, and the frame is kept as well."""
        plan = self.write_backs.pop(which % len(self.write_backs))
        self._write(plan)
        self.tmem.commit_write_ahead(plan)

    @rule()
    def write_all_ahead(self) -> None:
        """Everything that is sealed becomes clean."""
        while plan := self.tmem.plan_write_ahead(self.tmem.segments.next_sequence):
            self._write(plan)
            self.tmem.commit_write_ahead(plan)

    @rule()
    def drop_clean(self) -> None:
        """The frame of a clean copy is wanted."""
        held, clean = len(self.tmem.arena.used), len(self.tmem.clean)
        assert (self.tmem.drop_clean() is None) == (clean == 0)
        assert len(self.tmem.arena.used) == held - (clean > 0)

    @rule(at=st.integers(1, 4))
    def crash_in_dropping_a_clean_copy(self, at: int) -> None:
        """All pages are there."""
        self._crash_in(at, self.tmem.drop_clean)

    @precondition(lambda self: self.write_backs)
    @rule(which=WHICH, tears=st.booleans())
    def abort_write_back(self, which: int, tears: bool) -> None:
        """The write fails, before or in the middle."""
        plan = self.write_backs.pop(which % len(self.write_backs))
        self.faulty.fail("write")
        self.faulty.tears = tears
        with pytest.raises(TierError):
            self._write(plan)
        self.faulty.fail()
        self.faulty.tears = False
        self.tmem.abort_write_back(plan)

    @precondition(lambda self: self.write_backs)
    @rule(which=WHICH, arrived=st.floats(0, 1))
    def crash_in_write_back(self, which: int, arrived: float) -> None:
        """The process is killed when part of the data has arrived, or all of it."""
        plan = self.write_backs[which % len(self.write_backs)]
        self.tier.write(plan.extent, plan.data[: int(len(plan.data) * arrived)], plan.sequence)
        self.start()

    @rule()
    def shrink_all(self) -> None:
        """Write back whatever can be written back now, and give its memory back."""
        while plan := self._next_write_back(include_open=True):
            self._write(plan)
            self.tmem.commit_write_back(plan)
            self._merge_all_in_ram()
        while release := self.tmem.reclaim.plan_release():
            self._release(release)

    @rule()
    def plan_compact(self) -> None:
        """Begin to merge sparse segments in RAM."""
        if plan := self.tmem.merges.plan_compact():
            assert len(plan.sources) > 1
            self.merges.append(plan)

    @rule()
    def plan_clean(self) -> None:
        """Begin to clean segments on the tier."""
        if plan := self.tmem.merges.plan_clean(PAGE_BYTES):
            self.merges.append(plan)

    @rule(dictionary=DICTIONARY, level=st.integers(1, 3))
    def plan_recompression(self, dictionary: bytes, level: int) -> None:
        """Begin to re-encode sealed segments with a new dictionary."""
        recompression = Recompression(self.tmem)
        recompression.look(None)
        encoder = Encoder(self.tmem.dictionaries.add(dictionary), level)
        if plan := recompression.plan(recompression.look(encoder), encoder):
            copied = self.tmem.merges.copy_in_ram(plan, recode=partial(reencode, encoder))
            assert not copied.damaged
            self.copied.append((plan, copied))

    @rule(dictionary=DICTIONARY)
    def recompress_and_shrink(self, dictionary: bytes) -> None:
        """Seal what is open, re-encode it, and write it back."""
        if plan := self._next_write_back(include_open=True):
            self.tmem.abort_write_back(plan)
        self.plan_recompression(dictionary, 1)
        while self.copied:
            self.tmem.merges.commit(*self.copied.pop())
        self.shrink_all()

    @precondition(lambda self: self.merges)
    @rule(which=WHICH)
    def copy_merge(self, which: int) -> None:
        """Copy live records, and write it to the tier where it came from there."""
        plan = self.merges.pop(which % len(self.merges))
        self.copied.append((plan, self._copy(plan)))

    @precondition(lambda self: self.copied)
    @rule(which=WHICH)
    def commit_merge(self, which: int) -> None:
        """Move the handles of what has not changed since."""
        self.tmem.merges.commit(*self.copied.pop(which % len(self.copied)))

    @precondition(lambda self: self.copied)
    @rule(which=WHICH)
    def give_up_merge(self, which: int) -> None:
        """It gains nothing, or so it is said."""
        plan, copied = self.copied.pop(which % len(self.copied))
        self.tmem.merges.gains(plan, copied)
        self.tmem.merges.abort(plan, copied.damaged, gains=False)

    @precondition(lambda self: self.merges or self.copied)
    @rule(which=WHICH)
    def abort_merge(self, which: int) -> None:
        """It could not be read or written."""
        plans = self.merges + [plan for plan, _ in self.copied]
        plan = plans[which % len(plans)]
        self.merges = [other for other in self.merges if other is not plan]
        self.copied = [(other, copied) for other, copied in self.copied if other is not plan]
        self.tmem.merges.abort(plan)

    @precondition(lambda self: self.copied)
    @rule(which=WHICH, steps=st.integers(0, 12))
    def crash_in_merge(self, which: int, steps: int) -> None:
        """The process is killed while a merge moves its handles."""
        left = iter(range(steps))

        def pause() -> None:
            if next(left, None) is None:
                raise _Killed

        with suppress(_Killed):
            self.tmem.merges.commit(*self.copied[which % len(self.copied)], pause)
        self.start()

    @rule()
    def plan_release(self) -> None:
        """Begin to give frames back."""
        if plan := self.tmem.reclaim.plan_release(2):
            self.releases.append(plan)

    @precondition(lambda self: self.releases)
    @rule(ok=st.booleans())
    def finish_release(self, ok: bool) -> None:
        """The memory is released, or cannot be."""
        plan = self.releases.pop()
        if ok:
            self._release(plan)
        else:
            self.tmem.reclaim.abort_release(plan)

    @rule()
    def plan_discard(self) -> None:
        """Begin to punch holes."""
        if plan := self.tmem.reclaim.plan_discard(3):
            self.discards.append(plan)

    @precondition(lambda self: self.discards)
    @rule(ok=st.booleans())
    def finish_discard(self, ok: bool) -> None:
        """The holes are punched, or cannot be this time."""
        plan = self.discards.pop()
        if ok:
            self.tier.discard(plan.extents)
            self.tmem.reclaim.commit_discard(plan)
        else:
            self.tmem.reclaim.abort_discard(plan)

    @rule()
    def punch_again(self) -> None:
        """Holes that could not be punched are tried again."""
        self.tmem.reclaim.punch_again()

    @rule()
    def punch_none(self) -> None:
        """The tier turns out not to be able to discard."""
        self.tmem.reclaim.punch_none()
        assert not self.tmem.extents.has_retired

    @invariant()
    def nothing_dead_keeps_a_segment_away(self) -> None:
        """What is not used, and not being punched or to be punched, can be written."""
        extents = self.tmem.extents
        retired = sum(SEGMENT_BYTES for plan in self.discards for _ in plan.extents)
        if not extents.has_retired:
            most = extents.limit_bytes - extents.reserve_bytes - sum(extents.out.values()) - retired
            of_number = (EXTENTS - len(extents.out)) * SEGMENT_BYTES - extents.reserve_bytes - retired
            assert extents.free_bytes >= min(most, of_number)

    @rule()
    def plan_populate(self) -> None:
        """Begin to fault a frame in."""
        if plan := self.tmem.reclaim.plan_populate():
            self.populates.append(plan)

    @precondition(lambda self: self.populates)
    @rule(ok=st.booleans())
    def finish_populate(self, ok: bool) -> None:
        """The frame is faulted in, or the kernel has no memory."""
        self.tmem.reclaim.commit_populate(self.populates.pop(), ok)

    @rule(frames=st.integers(4, FRAMES))
    def limit_pool(self, frames: int) -> None:
        """Set the pool's limit."""
        self.limit = frames
        self.tmem.limit_pool(frames * SEGMENT_BYTES)

    @rule(extents=st.integers(0, EXTENTS))
    def limit_backing(self, extents: int) -> None:
        """Set the backing's limit."""
        self.tmem.limit_backing(extents * SEGMENT_BYTES)

    @rule()
    def crash(self) -> None:
        """The process is killed: what was under way is forgotten, and another one starts from the regions."""
        self.start()

    @rule(at=POINT, first=SLOT, count=st.integers(1, 40), kind=st.sampled_from((*KINDS, "raw")), seed=SEED)
    def crash_in_a_store(self, at: int, first: int, count: int, kind: Kind, seed: int) -> None:
        """The process is killed behind some write of a store: each of its pages is old or new."""
        new = {slot: page_of(kind, seed + slot) for slot in range(first, min(first + count, SLOTS))}
        packed = [encode(page, parse_codec("lz4")) for page in new.values()]
        store_in_python(self.tmem)
        self._crash_in(at, lambda: self.tmem.store(first, packed), new)

    @rule(at=POINT, first=SLOT, count=st.integers(1, 2000))
    def crash_in_an_invalidate(self, at: int, first: int, count: int) -> None:
        """Each of its pages is there or forgotten."""
        gone = dict.fromkeys(range(first, min(first + count, SLOTS)), ZERO_PAGE)
        self._crash_in(at, lambda: self.tmem.invalidate(first, len(gone)), gone)

    @rule(at=st.integers(1, 9))
    def crash_in_a_write_back(self, at: int) -> None:
        """All pages are there, whether or not the segment was written."""
        if plan := self._next_write_back(include_open=True):
            self._crash_in(at, lambda: self._write_and_commit(plan))

    @rule(at=st.integers(1, 9))
    def crash_in_a_write_ahead(self, at: int) -> None:
        """All pages are there, in RAM as well or not."""
        if plan := self.tmem.plan_write_ahead(self.tmem.segments.next_sequence):
            self._crash_in(at, lambda: self._write_and_commit(plan, self.tmem.commit_write_ahead))

    @precondition(lambda self: self.merges)
    @rule(which=WHICH, at=POINT)
    def crash_anywhere_in_a_merge(self, which: int, at: int) -> None:
        """All pages are there, whether or not their records were moved."""
        plan = self.merges[which % len(self.merges)]
        self._crash_in(at, lambda: self.tmem.merges.commit(plan, self._copy(plan)))

    @rule(at=st.integers(1, 9))
    def crash_in_a_recovery(self, at: int) -> None:
        """The next process is killed as well, before it has recovered."""
        self._crash_in(at, lambda: self.regions.start(self.limit, SLOTS))

    def _crash_in(self, at: int, operation: Callable[[], object], may_be: dict[int, bytes] | None = None) -> None:
        """Begin `operation`, and go on from what a kill at the `at`-th point of it leaves, or one behind its end.

        A slot of `may_be` has its page from there, or still the one that it had.
        """
        kept: list[tuple[Left, Sequences]] = []

        def at_point() -> None:
            if points.count == at:
                kept.append((Left.to_stay(self.regions, self.faulty), self.sequences.copy()))

        points = CrashPoints(self.regions, self.faulty, at_point)
        points.run(operation)
        if kept:  # else it was killed behind its end
            self.regions.close()
            left, self.sequences = kept[0]
            self.regions, self.faulty = left.regions, left.tier
        self.start()
        for slot, page in (may_be or {}).items():
            found = self.reader.perform(self.tmem.plan_read(slot, 1))
            assert found in ([page], self._expected(slot, 1))
            if self.tmem.slots.handles[slot]:
                self.pages[slot] = found[0]
            else:
                self.pages.pop(slot, None)

    @invariant()
    def agrees(self) -> None:
        """What the store counts is what a scan finds, and what the dict holds."""
        check(self.tmem)
        assert statistics(self.tmem).pages_stored == len(self.pages)

    def teardown(self) -> None:
        """Every page comes back right."""
        for slot in range(0, SLOTS, 8):
            assert self.reader.perform(self.tmem.plan_read(slot, 8)) == self._expected(slot, 8)
        self.regions.close()
        self.key.close()

    def _expected(self, first: int, count: int) -> list[bytes]:
        return [self.pages.get(slot, ZERO_PAGE) for slot in range(first, first + count)]

    def _write(self, plan: WriteBack) -> None:
        self.sequences.write(plan.sequence, plan.data)
        self.tier.write(plan.extent, plan.data, plan.sequence)

    def _write_and_commit(self, plan: WriteBack, commit: Callable[[WriteBack], object] | None = None) -> None:
        self._write(plan)
        (commit or self.tmem.commit_write_back)(plan)

    def _copy(self, plan: Merge) -> Copied:
        copied = copy_for(self.tmem, plan, self.tier)
        if plan.extent is not None:
            self.sequences.write(plan.sequence, copied.data)
        return copied

    def _next_write_back(self, include_open: bool) -> WriteBack | None:
        try:
            if merge := self.tmem.plan_merge_before_write(include_open):
                self.merges.append(merge)
                return None
            return self.tmem.plan_write_back(include_open)
        except BackingFull:
            assert self.tmem.has_victims
            return None

    def _merge_all_in_ram(self) -> None:
        for plan in [plan for plan in self.merges if plan.extent is None]:
            self.merges.remove(plan)
            merge(self.tmem, plan, self.tier)

    def _release(self, plan: Release) -> None:
        for frame in plan.frames:
            self.tmem.arena.frame_view(frame)[:] = bytes(SEGMENT_BYTES)
        self.tmem.reclaim.commit_release(plan)


TestTmem = TmemMachine.TestCase
TestTmem.settings = settings(
    max_examples=100 * FACTOR, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
