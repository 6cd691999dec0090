"""The tmem: store, load and invalidate pages of swap slots; plan what moves them between RAM and the tier.

A store appends pages as records to the open segment of their lane. A full segment is sealed. Sealed segments are planned for
write-back, the oldest first. The store is synchronous, does no I/O and starts no thread: the caller performs a plan, then commits
or aborts it, and the commit checks again what may have changed meanwhile.

`Tmem` composes the parts and has the lock that guards them: the ledger counts (ledger.py), transitions change a segment's state and
all that depends on it (transitions.py), recovery reads the regions at a start (recovery.py).

Thread-safety: any thread may call every public method, which takes the lock. `merges` and `reclaim` take it, too. Properties read
without the lock, and may be outdated when they return. Pages are compressed before `store`, never under the lock. The one page that
a load decompresses is decompressed under it: otherwise the frame could be released and reused during decompression.

Order of a store: record bytes, then fill, then the handle. Order of a write-back: data written, then the segment's place, then the
frame is given back. So a process killed at any instruction leaves regions from which `Tmem` starts again.

Invariants (`consistency.check` compares 1 and 2 with a scan):
1. A handle refers to a record inside the fill of a segment that is not free.
2. The ledger, used frames and used extents are what a scan of slots and segments finds.
3. Pool memory (frames held) stays within the arena's limit; extents out stay within the extents' limit.
4. A frame is given back only after its segment lies on the tier or is empty.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

import lz4.block

from tmemfs.errors import BackingFull, Corrupt
from tmemfs.policy.cleaning import benefit_per_cost
from tmemfs.policy.victims import MOST_EXAMINED, next_victim
from tmemfs.store.codec import LZ4, ZERO_PAGE, ZSTD_DICT, Packed, decode
from tmemfs.store.damage import Damage
from tmemfs.store.dictionary import Dictionaries, Dictionary, read_dictionary
from tmemfs.store.extents import Extents
from tmemfs.store.frames import Arena
from tmemfs.store.lanes import Lane
from tmemfs.store.ledger import COMPRESSED_BYTES, RAW_STORES, STORED_BYTES, STORES, Ledger
from tmemfs.store.merge_plans import Merge
from tmemfs.store.merges import Merges
from tmemfs.store.native import appender, count_pool
from tmemfs.store.plans import ReadPlan, RecordAt, WriteBack
from tmemfs.store.reclaim import Reclaim
from tmemfs.store.record import (
    EMPTY,
    LENGTH_MASK,
    LENGTH_SHIFT,
    OFFSET_BYTES_MASK,
    OFFSET_BYTES_SHIFT,
    RECORD_HEADER_BYTES,
    SEGMENT_SHIFT,
    TAG_MASK,
    ZERO_HANDLE,
    SegmentId,
    handle_length,
    handle_offset,
    handle_segment,
    handle_tag,
    segment_seed,
    whole_blocks,
)
from tmemfs.store.recovery import recover
from tmemfs.store.segments import FREE, MOST_BOTH, ON_TIER, WRITING, SegmentTable
from tmemfs.store.slots import SlotTable
from tmemfs.store.transitions import Notice, Transitions
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES

#: Handle of a slot and sequence of its segment: a place in a segment is used once in a sequence.
Version = tuple[int, int]
_decompress = lz4.block.decompress


@dataclass(slots=True)
class Counts:
    """What was done since the start, in pages. Guarded by the lock. What was stored is counted by `ledger`.

    `damaged_in_ram` is the number of records that loads from RAM found damaged.
    """

    ledger: Ledger = field(compare=False, repr=False)
    loads_ram: int = 0
    loads_disk: int = 0
    invalidates: int = 0
    damaged_in_ram: int = 0

    @property
    def stores(self) -> int:
        """Pages stored."""
        return self.ledger.sum_of(STORES)

    @property
    def raw_stores(self) -> int:
        """Those of them that were stored as they are."""
        return self.ledger.sum_of(RAW_STORES)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all their payloads."""
        return self.ledger.sum_of(STORED_BYTES)


class Tmem:
    """Pages by swap slot, over the regions of `slots`, `segments` and `arena`; extents are numbered by `extents`.

    `notice` is called, under the lock, when there may be work for the jobs (transitions.py). `score` ranks the victims of
    cleaning (merges.py).
    """

    def __init__(
        self,
        slots: SlotTable,
        segments: SegmentTable,
        arena: Arena,
        extents: Extents,
        notice: Notice = lambda frame_freed: None,
        score: Callable[[float, float], float] = benefit_per_cost,
    ) -> None:
        # constant after construction
        self.lock: Final = threading.Lock()
        self.slots: Final = slots
        self.segments: Final = segments
        self.arena: Final = arena
        self.extents: Final = extents
        self.notice: Final = notice
        # guarded by the lock
        self.ledger: Final = Ledger(segments)
        self.transitions: Final = Transitions(segments, self.ledger, arena, extents, notice)
        self.lanes: Final = self.transitions.lanes
        self.clean: Final = self.transitions.clean
        self.counts: Final = Counts(self.ledger)
        self.dictionaries: Final = Dictionaries()
        # it has a lock of its own
        self.damage: Final = Damage()
        recover((slots,), self.transitions, self.dictionaries, count_pool)
        # their methods take the lock
        self.merges: Final = Merges(self.lock, slots, self.transitions, self.dictionaries, score)
        self.reclaim: Final = Reclaim(self.lock, arena, extents, notice)
        self._appender = appender(slots, self.transitions)

    # ---- pages -----------------------------------------------------------------------------------------------------

    def store(self, first: int, packed: list[Packed], start: int = 0) -> int:
        """Store the encoded pages of slots first+start, ...; returns how many entries of `packed` are stored now.

        Fewer than all of them means that there is no free frame for the next one: free one, and continue from there.
        """
        with self.lock:
            return self._appender.append(first, packed, start)

    def store_if(self, slot: int, expected: Version, packed: Packed) -> bool | None:
        """Store one page if the slot's version is still `expected`: True; False if it is not; None without a free frame."""
        with self.lock:
            if self._version(slot) != expected:
                return False
            return True if self._appender.append(slot, [packed]) else None

    def version(self, slot: int) -> Version:
        """What changes with every store and invalidate of `slot`, and with nothing else."""
        with self.lock:
            return self._version(slot)

    def load(self, slot: int) -> bytes | None:
        """The page of `slot`, zeros if it was never stored; None if its record lies on a tier. Raises Corrupt."""
        with self.lock:
            handle = self.slots.handles[slot]
            if handle <= ZERO_HANDLE:
                return ZERO_PAGE
            # The handle is taken apart here: calls of record.py's decoder would take 0.2 us more per load, of 4.
            segments, segment, tag = self.segments, handle >> SEGMENT_SHIFT, handle & TAG_MASK
            base = segments.base[segment]
            if base < 0:
                return None
            # Its second chance: write-back passes this segment over once.
            segments.loaded[segment] = 1
            at = base + (handle >> OFFSET_BYTES_SHIFT & OFFSET_BYTES_MASK) + RECORD_HEADER_BYTES
            payload = self.arena.view[at : at + (handle >> LENGTH_SHIFT & LENGTH_MASK)]
            self.counts.loads_ram += 1
            try:
                if tag == LZ4:
                    page: bytes = _decompress(payload, PAGE_BYTES)
                    # A damaged payload may decompress to less than a page, which lz4 does not call an error.
                    if len(page) == PAGE_BYTES:
                        return page
                elif tag == ZSTD_DICT:
                    return self._dictionary_in_ram(SegmentId(segment)).decode(payload)
                else:
                    return decode(tag, payload)
            except (lz4.block.LZ4BlockError, Corrupt):
                pass
            seed = segment_seed(segments.sequence(SegmentId(segment)))
            self.counts.damaged_in_ram += self.damage.note_record(seed, handle_offset(handle), "in_ram")
            raise Corrupt(f"the record of slot {slot} is damaged in RAM: test the machine's memory")

    def invalidate(self, first: int, count: int) -> None:
        """Forget the pages of slots [first, first + count)."""
        handles, ledger = self.slots.handles, self.ledger
        with self.lock:
            for slot in self.slots.occupied(first, first + count):
                old = handles[slot]
                # The handle first: a crash behind it leaves a record that nothing refers to, and no handle without a record.
                handles[slot] = EMPTY
                self.counts.invalidates += 1
                if outcome := ledger.drop(old):
                    self.transitions.dropped(old, outcome)

    # ---- plans -----------------------------------------------------------------------------------------------------

    def plan_read(self, first: int, count: int) -> ReadPlan:
        """What has to be read for slots [first, first + count): pages in RAM are loaded, the others' segments pinned.

        If a page in RAM is damaged, the plan ends in front of it. Raises Corrupt if that is the first page.
        """
        pages: list[bytes | None] = []
        records: list[RecordAt] = []
        try:
            for at in range(count):
                page = self.load(first + at)
                while page is None:
                    record = self.pin_record(first + at, at)
                    if record is not None:
                        records.append(record)
                        break
                    page = self.load(first + at)  # stored again or invalidated between the two
                pages.append(page)
        except Corrupt:
            if not pages:  # and nothing is pinned
                raise
        return ReadPlan(pages, tuple(records))

    def pin_record(self, slot: int, at: int = 0) -> RecordAt | None:
        """Where a tier holds the page of `slot`, the segment pinned until `commit_read`; None if it is not on a tier any more."""
        with self.lock:
            handle = self.slots.handles[slot]
            segment = handle_segment(handle)
            if handle <= ZERO_HANDLE or self.segments.state(segment) != ON_TIER:
                return None
            # Else a cleaning, or the last invalidate, could retire the extent, and another segment be written over it before the
            # read.
            self.segments.pin(segment)
            return RecordAt(
                at,
                slot,
                segment,
                self.segments.sequence(segment),
                self.segments.extent(segment),
                self.segments.dictionary(segment),
                handle_offset(handle),
                handle_tag(handle),
                handle_length(handle),
            )

    def commit_read(self, records: Sequence[RecordAt]) -> None:
        """`records` have been read, or could not be: nothing is pinned for them any more."""
        with self.lock:
            self.counts.loads_disk += len(records)
            for record in records:
                self.transitions.unpin(record.segment)

    def plan_merge_before_write(self, include_open: bool = False) -> Merge | None:
        """Merge the next victim with its neighbours; None if it is dense enough to be written as it is, or if there is none."""
        with self.lock:
            lane = self._lane_to_shrink(include_open)
            victim, passed = self._victim(lane)
            merge = self.merges.plan_before_write(lane, victim) if victim is not None else None
            if merge is not None:
                self._spend_second_chance(passed)
            return merge

    def plan_write_back(self, include_open: bool = False) -> WriteBack | None:
        """The next victim: raw segments before packed ones, old before young, loaded from after not; None if there is none.

        Ask for `plan_merge_before_write` first. Raises BackingFull without an extent.
        """
        with self.lock:
            lane = self._lane_to_shrink(include_open)
            segment, passed = self._victim(lane)
            if segment is None:
                return None
            self._spend_second_chance(passed)
            plan = self._begin_write(segment)
            if plan is None:
                raise BackingFull("the backing is full: raise backing.max or give it more space")
            return plan

    def plan_write_ahead(self, youngest: int) -> WriteBack | None:
        """The next segment to be written ahead: dense, with an age of `youngest` or less. None without one, or without an extent.

        Whether it was loaded from does not matter, for it stays in RAM.
        """
        packed, raw = self.lanes
        with self.lock:
            for lane in (raw, packed):  # as they leave RAM; where the raw ones are young, packed ones may have rested
                for segment in islice(lane.sealed, MOST_EXAMINED):
                    if self.segments.age(segment) > youngest:
                        break
                    if not self.merges.is_to_be_merged(segment):
                        return self._begin_write(segment)
        return None

    def _begin_write(self, segment: SegmentId) -> WriteBack | None:
        """`segment`, which is sealed, is being written; None without an extent."""
        whole = whole_blocks(self.segments.fill(segment))
        extent = self.extents.take(whole)
        if extent is None:
            return None
        self.transitions.withdraw(segment)
        frame = self.segments.frame(segment)
        self.segments.move(segment, WRITING, frame)
        view = self.arena.frame_view(frame, whole)
        return WriteBack(segment, self.segments.sequence(segment), frame, extent, view, self.ledger.pages[segment])

    def commit_write_ahead(self, plan: WriteBack) -> None:
        """The data of `plan` is on the tier: the segment lies there, too, and loads read it from RAM."""
        with self.lock:
            if self.ledger.live[plan.segment] and max(plan.frame, plan.extent) < MOST_BOTH:
                self.transitions.keep_copy(plan.segment, plan.frame, plan.extent)
                return
        self.commit_write_back(plan)

    def drop_clean(self) -> int | None:
        """Give the frame of a clean copy back, without any I/O: how many frames are released to the system; None without a copy.

        If none is released, the reserve was short and keeps it.
        """
        with self.lock:
            segment = self.clean.next_victim()
            if segment is None:
                return None
            is_released = self.transitions.drop_copy(segment)
            self.notice(True)
            return int(is_released)

    def commit_write_back(self, plan: WriteBack) -> bool:
        """The data of `plan` is on the tier: change the segment's place and give its frame back. Loads read from the tier now.

        Whether the frame's memory is released to the system; if not, the reserve was short and keeps it.
        """
        with self.lock:
            # All its pages may have been dropped while it was written.
            if self.ledger.live[plan.segment]:
                self.segments.move(plan.segment, ON_TIER, plan.extent)
                self.ledger.written_back(plan.segment)
            else:
                self.segments.move(plan.segment, FREE, 0)
                self.extents.retire(plan.extent)
            is_released = self.arena.give_back(plan.frame)
            self.notice(True)
            return is_released

    def abort_write_back(self, plan: WriteBack) -> None:
        """The data of `plan` is not on the tier: the segment stays in RAM, next in line; its extent will be punched."""
        with self.lock:
            # Part of it may have been written. So its hole is punched, although it never held a segment.
            self.extents.retire(plan.extent)
            if self.ledger.live[plan.segment]:
                self.transitions.keep_in_ram(plan.segment, plan.frame)
            else:
                self.transitions.free_in_ram(plan.segment, plan.frame)
            self.notice(True)

    # ---- limits ----------------------------------------------------------------------------------------------------

    def limit_pool(self, limit_bytes: int) -> None:
        """At most `limit_bytes` of RAM from now on; what is above has to be shrunk by the caller."""
        with self.lock:
            before, had_frame = self.arena.limit, self.arena.has_free_frame
            self.arena.set_limit(limit_bytes // SEGMENT_BYTES)
            is_freed = self.arena.has_free_frame and not had_frame
            # Work for the jobs: memory to release, or a reserve that may be filled now.
            if self.arena.shed_ready() or is_freed or (self.arena.limit > before and self.arena.wants_populating):
                self.notice(is_freed)

    def limit_backing(self, limit_bytes: int) -> None:
        """At most `limit_bytes` of extents from now on; those above it are not taken back."""
        with self.lock:
            self.extents.set_limit(limit_bytes)

    @property
    def has_victims(self) -> bool:
        """Whether segments that are sealed or clean lie in RAM."""
        return any(lane.sealed for lane in self.lanes) or len(self.clean) > 0

    @property
    def is_held_elsewhere(self) -> bool:
        """Whether segments in RAM are being merged or written: neither open nor victims now, but perhaps soon."""
        with self.lock:
            return len(self.arena.used) > len(self.clean) + sum(len(lane.sealed) + lane.is_open for lane in self.lanes)

    @property
    def pages_stored(self) -> int:
        """Live pages, zero pages included."""
        return sum(self.ledger.totals().pages_by_tag)

    @property
    def compressed_bytes(self) -> int:
        """Bytes of the payloads of all live pages."""
        return self.ledger.sum_of(COMPRESSED_BYTES)

    @property
    def pool_bytes(self) -> int:
        """RAM the pool holds."""
        return self.arena.held * SEGMENT_BYTES

    # ---- inside the lock -------------------------------------------------------------------------------------------

    def _version(self, slot: int) -> Version:
        handle = self.slots.handles[slot]
        return handle, self.segments.sequence(handle_segment(handle)) if handle > ZERO_HANDLE else 0

    def _lane_to_shrink(self, include_open: bool) -> Lane:
        """The lane whose segments leave RAM next: raw ones gain nothing there."""
        if include_open and not self.has_victims:
            for lane in self.lanes:
                if lane.fill:
                    self.transitions.seal(lane)
        packed, raw = self.lanes
        return raw if raw.sealed else packed

    def _victim(self, lane: Lane) -> tuple[SegmentId | None, list[SegmentId]]:
        """The next segment of `lane` to leave RAM, and those passed over for it because they were loaded from."""
        loaded = self.segments.loaded
        return next_victim((segment, bool(loaded[segment])) for segment in lane.sealed)

    def _spend_second_chance(self, passed: list[SegmentId]) -> None:
        """A victim was taken: `passed` are not passed over again. Not before, because a search that takes none may be repeated."""
        for segment in passed:
            self.segments.loaded[segment] = 0

    def _dictionary_in_ram(self, segment: SegmentId) -> Dictionary:
        """What the records of `segment`, which is in RAM, were encoded with. Raises Corrupt."""
        number = self.segments.dictionary(segment)
        found = self.dictionaries.known(number)
        if found is None:  # since a crash
            frame = self.arena.frame_view(self.segments.frame(segment))
            data = read_dictionary(frame, segment_seed(self.segments.sequence(segment)))
            found = self.dictionaries.adopt(number, data)
        return found
