"""Merges: live records of several segments copied into one, without decoding any of them, unless that is what it is for.

*Compaction* makes one segment in RAM of sparse ones there: of those of neighbouring age before they are written back, of the
emptiest, wherever they are, in the background; *cleaning* makes one segment on the tier of others there; *recompression* re-encodes
records of segments in RAM. All go the same way: plan (sources and target are chosen and kept from all others), copy (outside the
lock; merge_copy.py), commit (handles that still refer to the old place are pointed to the new one, a few at a time; sources without
live records are freed). merge_plans.py has what is handed on.

Records that were encoded with a dictionary need it at the start of their segment. So only segments of the same one are merged.

While a merge is under way, loads read the old place, and stores and invalidates win: commit moves no handle that has changed.

What a merge gains is known once it is copied, with the gaps between records, the dictionary and whole blocks. One that gains
nothing is given up before it is written, and its sources are not tried again before a record of them is dropped. So each merge
makes its figure smaller (frames, or blocks of the tier), and however often merges are asked for, they come to an end.

Order: target's records, then its fill and place (for a tier: data written first), then the handles, then the sources are freed.
So a process killed at any instruction leaves each handle at a whole record.

Thread-safety: any number of merges at once, each by one thread.

Invariants:
1. The segments of a merge are in no list of victims, and not freed, until it is committed or aborted.
2. Records of a cleaned segment were all on the tier before: cold ones are never mixed with fresh ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final

from tmemfs.policy.cleaning import DENSE_SHARE, Space, benefit_per_cost, is_sparse
from tmemfs.policy.victims import MOST_EXAMINED
from tmemfs.store.dictionary import DICTIONARY_RECORD_BYTES, Dictionaries
from tmemfs.store.lanes import Lane
from tmemfs.store.ledger import LIVE_BYTES, TIER_LIVE_BYTES
from tmemfs.store.merge_copy import RecordCopier, keep
from tmemfs.store.merge_plans import Copied, Merge, MergeCounts, Pause, Recode, Source, no_pause
from tmemfs.store.occupancy import TIER
from tmemfs.store.record import SegmentId, whole_blocks
from tmemfs.store.segments import LANE_COLD, ON_TIER, OPEN
from tmemfs.store.slots import SlotTable
from tmemfs.store.transitions import Transitions
from tmemfs.tiers.tier import Extent
from tmemfs.units import BLOCK_BYTES, SEGMENT_BYTES

#: Handles moved under one hold of the lock, before others may take the lock.
_MOVES_AT_ONCE: Final = 4
#: Segments that one cleaning reads, at most: what bounds its work where nearly nothing is live.
_MOST_SOURCES: Final = 16
#: A cleaning has to gain this much disk: nearly full segments are left alone.
LEAST_GAIN_BYTES: Final = SEGMENT_BYTES // 32


class Merges:
    """Plans and commits merges of the pages of `slots`, under `lock`. `score` ranks victims on the tier by live share and age."""

    def __init__(
        self,
        lock: threading.Lock,
        slots: SlotTable,
        transitions: Transitions,
        dictionaries: Dictionaries,
        score: Callable[[float, float], float] = benefit_per_cost,
    ) -> None:
        # constant after construction
        self._lock: Final = lock
        self._slots: Final = slots
        self._transitions: Final = transitions
        self._segments: Final = transitions.segments
        self._ledger: Final = transitions.ledger
        self._arena: Final = transitions.arena
        self._extents: Final = transitions.extents
        self._score: Final = score
        # guarded by the lock
        self.counts = MergeCounts()
        #: Sequences of segments in RAM that cannot be emptied, or to no gain: those are not tried again.
        self._left_alone: set[int] = set()
        self._copier: Final = RecordCopier(lock, slots, dictionaries, self.counts)

    def plan_compact(self) -> Merge | None:
        """Sparse segments in RAM, wherever they are, that fill one frame less than they have; None if there are none."""
        with self._lock:
            for lane in self._transitions.lanes:
                emptiest = filter(self.can_be_emptied, self._ledger.occupancy.emptiest(lane.index, DENSE_SHARE))
                chosen = max(map(self._fitting, self._by_dictionary(islice(emptiest, MOST_EXAMINED))), key=len, default=[])
                if len(chosen) > 1:
                    return self.plan_merge(lane, sorted(chosen, key=self._segments.age))
        return None

    def plan_before_write(self, lane: Lane, victim: SegmentId) -> Merge | None:
        """`victim`, if it is sparse, and the sparse ones next to it in age. Under the lock."""
        if not self.is_to_be_merged(victim):
            return None
        others = (s for s in islice(lane.sealed, MOST_EXAMINED) if s != victim and self.is_to_be_merged(s))
        alike, *_ = self._by_dictionary([victim, *others])
        return self.plan_merge(lane, self._fitting(alike))

    def plan_merge(self, lane: Lane, segments: list[SegmentId], dictionary: int | None = None) -> Merge | None:
        """Merge `segments`, sealed ones of `lane`, oldest first; None without a frame to do it in. Under the lock.

        The target has their `dictionary`, or another, if their records are to be re-encoded.
        """
        # The spare frame is kept for this: a full pool could not be compacted otherwise.
        frame = self._arena.take_spare()
        if frame is None:
            return None
        table, target = self._segments, self._segments.take()
        # As old as the youngest of them: with an older age, young pages would be cleaned as if they were cold.
        sequence = table.open(target, lane.index, frame, max(map(table.age, segments)))
        sources = tuple(map(self._source_in_ram, segments))
        if dictionary is None:
            dictionary = table.dictionary(segments[0])
        return Merge(sources, target, sequence, frame, None, self._arena.frame_view(frame), dictionary)

    def plan_clean(self, least_gain_bytes: int = LEAST_GAIN_BYTES) -> Merge | None:
        """The best victims on the tier whose live records fill one segment; None if too little would be gained."""
        with self._lock:
            victims = self._victims()
            if not victims or self._gain_of_cleaning(victims) < least_gain_bytes:
                return None
            # A whole segment, for what will have been copied is not known yet: commit gives back what is not needed.
            extent = self._extents.take(SEGMENT_BYTES, for_cleaning=True)
            if extent is None:
                return None
            table, target = self._segments, self._segments.take()
            # The target stays free until it is written, so that a crash leaves nothing of it.
            sequence = table.begin(target, max(map(table.age, victims)))
            sources = tuple(map(self._source_on_tier, victims))
            return Merge(sources, target, sequence, None, extent, None, table.dictionary(victims[0]))

    def copy_in_ram(self, plan: Merge, pause: Pause = no_pause, recode: Recode = keep) -> Copied:
        """See RecordCopier."""
        return self._copier.copy_in_ram(plan, pause, recode)

    def copy(self, plan: Merge, source: Source, data: memoryview, copied: Copied, pause: Pause = no_pause) -> None:
        """See RecordCopier."""
        self._copier.copy(plan, source, data, copied, pause)

    def gains(self, plan: Merge, copied: Copied) -> bool:
        """Whether a commit of what was `copied` gains anything: a frame, or a block of the tier, now or once it is written."""
        blocks = sum(whole_blocks(source.fill) for source in copied.emptied) - whole_blocks(copied.fill)
        frames = 0 if plan.frame is None else len(copied.emptied) - 1
        return frames * SEGMENT_BYTES + blocks >= BLOCK_BYTES

    def commit(self, plan: Merge, copied: Copied, pause: Pause = no_pause) -> int:
        """What was `copied` is in RAM, or on the tier: move the handles there, then free what nothing refers to.

        `pause` is called every few handles, without the lock. How many frames are released to the system.
        """
        with self._lock:
            self._segments.set_fill(plan.target, copied.fill, plan.dictionary)
            if plan.extent is not None:
                self._extents.resize(plan.extent, whole_blocks(copied.fill))
                self._segments.move(plan.target, ON_TIER, plan.extent, LANE_COLD)
                # Until all handles are moved, the target may be empty at times: that must not free it.
                self._segments.pin(plan.target)
        moves = iter(copied.moves)
        while some := list(islice(moves, _MOVES_AT_ONCE)):
            with self._lock:
                self._repoint(some)
            pause()
        with self._lock:
            self._count(plan, copied)
            released = self._finish_sources(plan, copied.damaged)
            released += self._finish_target(plan)
            self._transitions.notice(True)
            return released

    def abort(self, plan: Merge, damaged: Iterable[SegmentId] = (), gains: bool = True) -> None:
        """Nothing was copied, or it could not be written, or it `gains` nothing: everything stays where it was."""
        with self._lock:
            self._finish_sources(plan, set(damaged), aside=not gains and not damaged)
            if plan.extent is not None:
                self._segments.give_back(plan.target)
                # Part of it may have been written, so its hole has to be punched.
                self._extents.retire(plan.extent)
            else:
                self._free_target_in_ram(plan)
            self._transitions.notice(True)

    def space(self) -> Space:
        """What segments take of the tier, and how much of that is live. Under the lock or outdated."""
        extents = self._extents
        # Clean copies count in RAM until they are dropped: a cleaning could do nothing about them.
        held = extents.held_bytes - extents.retired_bytes - self._transitions.clean.tier_bytes
        return Space(held, self._ledger.sum_of(TIER_LIVE_BYTES), extents.free_bytes)

    def space_in_ram(self) -> Space:
        """The same of the frames of full segments; the open ones are being filled. Under the lock or outdated."""
        arena, ledger = self._arena, self._ledger
        filling = [lane.segment for lane in self._transitions.lanes if lane.is_open]
        live = ledger.sum_of(LIVE_BYTES) - ledger.sum_of(TIER_LIVE_BYTES) - sum(ledger.live[segment] for segment in filling)
        frames = len(arena.used) - len(filling)
        return Space(frames * SEGMENT_BYTES, live, (arena.limit - arena.held) * SEGMENT_BYTES)

    def can_be_emptied(self, segment: SegmentId) -> bool:
        """Whether no damaged record was found in it, and it is not known that nothing is gained. Under the lock."""
        return self._segments.sequence(segment) not in self._left_alone

    def is_to_be_merged(self, segment: SegmentId) -> bool:
        """Whether too little of it is live for it to be written as it is; its dictionary would come along. Under the lock."""
        return is_sparse(self._needed_bytes([segment]), self._segments.fill(segment)) and self.can_be_emptied(segment)

    # ---- inside the lock -------------------------------------------------------------------------------------------

    def _needed_bytes(self, segments: list[SegmentId]) -> int:
        """What the live records of `segments`, which have the same dictionary, would fill of one."""
        dictionary = DICTIONARY_RECORD_BYTES if self._segments.dictionary(segments[0]) else 0
        return sum(self._ledger.live[segment] for segment in segments) + dictionary

    def _gain_of_cleaning(self, victims: list[SegmentId]) -> int:
        """Bytes of the tier that become free."""
        return sum(whole_blocks(self._segments.fill(s)) for s in victims) - whole_blocks(self._needed_bytes(victims))

    def _by_dictionary(self, segments: Iterable[SegmentId]) -> Iterable[list[SegmentId]]:
        """`segments` that have the same dictionary, those of the first one first."""
        alike: dict[int, list[SegmentId]] = {}
        for segment in segments:
            alike.setdefault(self._segments.dictionary(segment), []).append(segment)
        return alike.values()

    def _fitting(self, segments: Iterable[SegmentId]) -> list[SegmentId]:
        """As many of `segments`, from the first on, as one frame holds the live records of."""
        chosen: list[SegmentId] = []
        live = DICTIONARY_RECORD_BYTES
        for segment in segments:
            live += self._ledger.live[segment]
            if chosen and live > SEGMENT_BYTES:
                break
            chosen.append(segment)
        return chosen

    def _victims(self) -> list[SegmentId]:
        """Segments on the tier, the best to clean first, whose live records fit into one; then in order of age."""
        table, live = self._segments, self._ledger.live
        now = table.next_sequence

        def worth(segment: SegmentId) -> float:
            return self._score(live[segment] / whole_blocks(table.fill(segment)), now - table.age(segment))

        ranked = sorted(self._ledger.occupancy.candidates(TIER), key=worth, reverse=True)
        alike = next(iter(self._by_dictionary(ranked)), [])
        return sorted(self._fitting(alike[:_MOST_SOURCES]), key=table.age)

    def _source_in_ram(self, segment: SegmentId) -> Source:
        """Take a sealed segment out of its line."""
        table = self._segments
        self._transitions.begin_merge(segment)
        data = self._arena.frame_view(table.frame(segment))
        return Source(segment, table.sequence(segment), table.fill(segment), 0, data, Extent(0))

    def _source_on_tier(self, segment: SegmentId) -> Source:
        """Pin a segment on the tier, which is no victim any more."""
        table = self._segments
        self._ledger.withdraw(segment)
        # Else its extent would be free, and written over, once its last record is dropped: while it is being read.
        table.pin(segment)
        fill = table.fill(segment)
        return Source(segment, table.sequence(segment), fill, whole_blocks(fill), None, table.extent(segment))

    def _repoint(self, moves: list[tuple[int, int, int]]) -> None:
        """Let slots refer to the copies of their records, unless they were stored or invalidated since."""
        handles, move = self._slots.handles, self._ledger.move
        for slot, old, new in moves:
            if handles[slot] == old:
                handles[slot] = new
                move(old, new)

    def _finish_sources(self, plan: Merge, damaged: set[SegmentId], aside: bool = False) -> int:
        """Free the sources that nothing refers to any more; the others are as they were. How many frames are released.

        `aside`: nothing is gained with them before more records of them are dropped.
        """
        released = 0
        # The oldest is put back last, so that it is the first in line.
        for source in reversed(plan.sources):
            segment, live = source.segment, self._ledger.live[source.segment]
            if plan.extent is not None:
                self._transitions.unpin(segment)
                if live and segment not in damaged:
                    self._ledger.file(segment, aside)
                continue
            frame = self._segments.frame(segment)
            if live:
                if segment in damaged or aside:
                    self._left_alone.add(self._segments.sequence(segment))
                self._transitions.keep_in_ram(segment, frame)
            else:
                released += self._transitions.free_in_ram(segment, frame)
        return released

    def _finish_target(self, plan: Merge) -> int:
        """File the target, or free it where all of it was dropped meanwhile. How many frames are released."""
        target = plan.target
        live = self._ledger.live[target]
        if plan.extent is not None:
            self._transitions.unpin(target)
            if live:
                self._ledger.file(target)
        elif live:
            assert plan.frame is not None
            self._transitions.keep_in_ram(target, plan.frame)
        else:
            return self._free_target_in_ram(plan)
        return 0

    def _free_target_in_ram(self, plan: Merge) -> int:
        assert plan.frame is not None and self._segments.state(plan.target) == OPEN
        return self._transitions.free_in_ram(plan.target, plan.frame)

    def _count(self, plan: Merge, copied: Copied) -> None:
        counts = self.counts
        if plan.extent is None:
            counts.compactions += 1
            counts.compacted_records += len(copied.moves)
            counts.gained_frames += len(copied.emptied) - 1
        else:
            counts.cleanings += 1
            counts.cleaned_segments += len(plan.sources)
            counts.cleaned_bytes += len(copied.data)
