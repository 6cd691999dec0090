"""Merges: live records of several segments copied into one, without decoding any of them, unless that is what it is for.

*Compaction* makes one segment in RAM of sparse ones of neighbouring age, before they are written back; *cleaning* makes one
segment on the tier of others there; *recompression* encodes records of segments in RAM anew. All go the same way: plan (sources
and target chosen and kept from all others), copy (outside the lock; what died is left out, what lives is verified), commit
(handles that still refer to the old place are pointed to the new one, a few at a time; sources without live records are freed).

Records that were encoded with a dictionary need it at the start of their segment: only segments of the same one are merged.

A record that is damaged stays where it is, and so does its segment; so does a segment that did not fit as a whole, and, where
records are encoded anew, the rest of one. While a merge is under way loads go to the old place, and stores and invalidates win:
commit moves no handle that has changed.

What a merge gains is known once it is copied, with the gaps between records, the dictionary and whole blocks. One that gains
nothing is given up before it is written, and its sources are not tried again before something in them dies. So each merge makes its
figure smaller (frames, or blocks of the tier), and however often merges are asked for they come to an end.

Order: target's records, then its fill and place (for a tier: data written first), then the handles, then the sources are freed.
So a process killed at any instruction leaves each handle at a whole record.

Thread-safety: any number of merges at once, each by one thread.

Invariants:
1. The segments of a merge are in no list of victims, and not freed, until it is committed or aborted.
2. Records of a cleaned segment were all on the tier before: cold ones are never mixed with fresh ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from struct import error as StructError
from typing import TYPE_CHECKING, Final

from tmemfs.errors import Corrupt
from tmemfs.policy.cleaning import DENSE_SHARE, Space, benefit_per_cost, is_sparse
from tmemfs.policy.victims import MOST_EXAMINED
from tmemfs.store.codec import RAW
from tmemfs.store.dictionary import DICTIONARY_RECORD_BYTES, Dictionary, read_dictionary
from tmemfs.store.frames import Frame
from tmemfs.store.lanes import Lane
from tmemfs.store.occupancy import TIER
from tmemfs.store.record import (
    ENCODING_MASK,
    RECORD_HEADER_BYTES,
    SegmentId,
    handle_length,
    handle_of,
    handle_record_bytes,
    handle_segment,
    handle_tag,
    mark_gap,
    read_record,
    scan,
    segment_seed,
    start_of,
    whole_blocks,
    write_record,
)
from tmemfs.store.segments import FREE, LANE_COLD, MERGING, ON_TIER, OPEN, SEALED
from tmemfs.tiers.tier import Extent
from tmemfs.units import BLOCK_BYTES, SEGMENT_BYTES

if TYPE_CHECKING:
    from tmemfs.store.tmem import Tmem

#: Handles moved under one hold of the lock, before others have their turn.
_MOVES_AT_ONCE: Final = 4
#: Segments that one cleaning reads, at most: what bounds its work where nearly nothing lives.
_MOST_SOURCES: Final = 16
#: A cleaning has to gain this much disk: nearly full segments are left alone.
LEAST_GAIN_BYTES: Final = SEGMENT_BYTES // 32


Pause = Callable[[], None]
#: Encodes a record anew: tag and payload in and out.
Recode = Callable[[int, memoryview], tuple[int, bytes | memoryview]]


def no_pause() -> None:
    """Do not pause."""


def _keep(tag: int, payload: memoryview) -> tuple[int, memoryview]:
    """The record as it is."""
    return tag, payload


@dataclass(frozen=True, slots=True)
class Source:
    """A segment to copy from: `size_bytes` at `extent`, or in RAM as `data` (borrowed)."""

    segment: SegmentId
    seed: int
    fill: int
    size_bytes: int
    data: memoryview | None
    extent: Extent


@dataclass(frozen=True, slots=True)
class Merge:
    """Copy the live records of `sources` into `target`: in RAM at `frame` (then `into` is that), else for `extent`.

    `dictionary` is the number of the one that the target begins with; 0: none.
    """

    sources: tuple[Source, ...]
    target: SegmentId
    seed: int
    frame: Frame | None
    extent: Extent | None
    into: memoryview | None
    dictionary: int = 0


@dataclass(slots=True)
class Copied:
    """What was copied so far into `into`: `fill` bytes of records, as (slot, old handle, new handle)."""

    into: memoryview
    fill: int = 0
    moves: list[tuple[int, int, int]] = field(default_factory=list)
    #: Sources of which all that lives was copied.
    emptied: list[Source] = field(default_factory=list)
    is_full: bool = False
    damaged: set[SegmentId] = field(default_factory=set)

    @property
    def data(self) -> memoryview:
        """The whole blocks of what was copied."""
        return self.into[: whole_blocks(self.fill)]


@dataclass(slots=True)
class MergeCounts:
    """Since the start. Records moved, and bytes of them, by where they were."""

    compactions: int = 0
    compacted_records: int = 0
    gained_frames: int = 0
    cleanings: int = 0
    cleaned_segments: int = 0
    cleaned_records: int = 0
    cleaned_bytes: int = 0
    damaged_records: int = 0


class Merges:
    """Plans the merges of `tmem`. `score` ranks victims on the tier by live share and age."""

    def __init__(self, tmem: Tmem, score: Callable[[float, float], float] = benefit_per_cost) -> None:
        self.counts = MergeCounts()
        self.score = score
        self._tmem = tmem
        self._left_alone: set[int] = set()  # sequences of segments in RAM that cannot be emptied, or to no gain: not tried again

    def plan_compact(self) -> Merge | None:
        """Sparse segments in RAM, wherever they are, that fill one frame less than they have; None if there are none."""
        tmem = self._tmem
        with tmem.lock:
            for lane in tmem.lanes:
                emptiest = filter(self.can_be_emptied, tmem.occupancy.emptiest(lane.index, DENSE_SHARE))
                chosen = max(map(self._fitting, self._by_dictionary(islice(emptiest, MOST_EXAMINED))), key=len, default=[])
                if len(chosen) > 1:
                    return self.plan_merge(lane, sorted(chosen, key=tmem.segments.age))
        return None

    def plan_before_write(self, lane: Lane, victim: SegmentId) -> Merge | None:
        """`victim`, if it is sparse, and the sparse ones next to it in age. Under the lock."""
        if not self._is_sparse(victim):
            return None
        others = (s for s in islice(lane.sealed, MOST_EXAMINED) if s != victim and self._is_sparse(s))
        alike, *_ = self._by_dictionary([victim, *others])
        return self.plan_merge(lane, self._fitting(alike))

    def plan_merge(self, lane: Lane, segments: list[SegmentId], dictionary: int | None = None) -> Merge | None:
        """Merge `segments`, sealed ones of `lane`, oldest first; None without a frame to do it in. Under the lock.

        The target has their `dictionary`, or another, if their records are to be encoded anew.
        """
        tmem = self._tmem
        frame = tmem.arena.take_spare()
        if frame is None:
            return None
        table, target = tmem.segments, tmem.segments.take()
        sequence = table.open(target, lane.index, frame, max(map(table.age, segments)))
        sources = []
        for segment in segments:
            lane.remove(segment)
            table.move(segment, MERGING, table.index(segment))
            fill = table.fill(segment)
            data = tmem.arena.frame_view(Frame(table.index(segment)))
            sources.append(Source(segment, segment_seed(table.sequence(segment)), fill, 0, data, Extent(0)))
        if dictionary is None:
            dictionary = table.dictionary(segments[0])
        return Merge(tuple(sources), target, segment_seed(sequence), frame, None, tmem.arena.frame_view(frame), dictionary)

    def plan_clean(self, least_gain_bytes: int = LEAST_GAIN_BYTES) -> Merge | None:
        """The best victims on the tier whose live records fill one segment; None if too little would be gained."""
        tmem = self._tmem
        with tmem.lock:
            victims = self._victims()
            if not victims:
                return None
            dictionary = tmem.segments.dictionary(victims[0])
            needed = sum(tmem.segments.live[s] for s in victims) + (DICTIONARY_RECORD_BYTES if dictionary else 0)
            gain = sum(whole_blocks(tmem.segments.fill(s)) for s in victims) - whole_blocks(needed)
            if gain < least_gain_bytes:
                return None
            extent = tmem.extents.take(SEGMENT_BYTES, for_cleaning=True)
            if extent is None:
                return None
            table, target = tmem.segments, tmem.segments.take()
            sequence = table.begin(target, max(map(table.age, victims)))
            sources = tuple(map(self._tier_source, victims))
            return Merge(sources, target, segment_seed(sequence), None, extent, None, dictionary)

    def copy_in_ram(self, plan: Merge, pause: Pause = no_pause, recode: Recode = _keep) -> Copied:
        """Copy what lives of all sources of a merge in RAM, as far as it fits."""
        assert plan.into is not None
        copied = Copied(plan.into)
        for source in plan.sources:
            if source.data is not None and not copied.is_full:
                self.copy(plan, source, source.data, copied, pause, recode)
        return copied

    def copy(
        self,
        plan: Merge,
        source: Source,
        data: memoryview,
        copied: Copied,
        pause: Pause = no_pause,
        recode: Recode = _keep,
    ) -> None:
        """Copy what lives of `source`, whose bytes are `data`, behind what is `copied`, until that is full.

        `pause` is called after each record, `recode` before it is copied. A source that does not fit as a whole is not copied,
        unless records are encoded anew: then the rest of it can go with the next.
        """
        handles, into, fill = self._tmem.slots.handles, copied.into, copied.fill
        begin, moves_before = fill, len(copied.moves)
        slots = len(handles)
        try:
            if plan.dictionary and not fill:
                fill = self._dictionary(plan, source, data).write_to(into, plan.seed)
            for offset, slot, tag, length in scan(data, source.fill):
                old = handle_of(tag, length, offset, source.segment)
                if slot >= slots or handles[slot] != old:
                    continue
                try:
                    found = read_record(data, offset, slot, tag, length, source.seed)
                    tag, payload = recode(tag, found)
                except Corrupt:
                    copied.damaged.add(source.segment)
                    with self._tmem.lock:  # any number of threads copy
                        self.counts.damaged_records += 1
                    continue
                length = len(payload)
                at = start_of(fill, length)
                if at + RECORD_HEADER_BYTES + length > SEGMENT_BYTES:
                    copied.is_full = True
                    break
                if at != fill:
                    mark_gap(into, fill)
                fill = write_record(into, at, tag, slot, payload, plan.seed)
                copied.moves.append((slot, old, handle_of(tag, length, at, plan.target)))
                pause()
        except (StructError, Corrupt):  # a damaged length led past the end, or the dictionary is damaged
            copied.damaged.add(source.segment)
        if copied.is_full and recode is _keep:
            fill = begin
            del copied.moves[moves_before:]
        elif not copied.is_full and source.segment not in copied.damaged:
            copied.emptied.append(source)
        copied.fill = fill

    def gains(self, plan: Merge, copied: Copied) -> bool:
        """Whether a commit of what was `copied` gains anything: a frame, or a block of the tier, now or once it is written."""
        blocks = sum(whole_blocks(source.fill) for source in copied.emptied) - whole_blocks(copied.fill)
        frames = 0 if plan.frame is None else len(copied.emptied) - 1
        return frames * SEGMENT_BYTES + blocks >= BLOCK_BYTES

    def commit(self, plan: Merge, copied: Copied, pause: Pause = no_pause) -> int:
        """What was `copied` is in RAM, or on the tier: move the handles there, then free what nothing refers to.

        `pause` is called every few handles, without the lock. How many frames go back to the system.
        """
        tmem, table = self._tmem, self._tmem.segments
        with tmem.lock:
            table.set_fill(plan.target, copied.fill, plan.dictionary)
            if plan.extent is not None:
                tmem.extents.resize(plan.extent, whole_blocks(copied.fill))
                table.move(plan.target, ON_TIER, plan.extent, LANE_COLD)
                table.pin(plan.target)
        moves = iter(copied.moves)
        while some := list(islice(moves, _MOVES_AT_ONCE)):
            with tmem.lock:
                self._repoint(plan.target, some)
            pause()
        with tmem.lock:
            self._count(plan, copied)
            goes = self._finish_sources(plan, copied.damaged)
            goes += self._finish_target(plan)
            tmem.notice()
            return goes

    def abort(self, plan: Merge, damaged: Iterable[SegmentId] = (), gains: bool = True) -> None:
        """Nothing was copied, or it could not be written, or it `gains` nothing: everything stays where it was."""
        tmem, table = self._tmem, self._tmem.segments
        with tmem.lock:
            self._finish_sources(plan, set(damaged), set_aside=not gains and not damaged)
            if plan.extent is not None:
                table.give_back(plan.target)
                tmem.extents.retire(plan.extent)
            else:
                self._drop_target_in_ram(plan)
            tmem.notice()

    def space(self) -> Space:
        """What segments take of the tier, and how much of that lives. Under the lock or outdated."""
        tmem = self._tmem
        return Space(tmem.extents.held_bytes - tmem.extents.retired_bytes, tmem.tier_live_bytes, tmem.extents.free_bytes)

    def space_in_ram(self) -> Space:
        """The same of the frames of full segments; the open ones are being filled. Under the lock or outdated."""
        tmem = self._tmem
        filling = [lane.segment for lane in tmem.lanes if lane.is_open]
        live = tmem.live_bytes - tmem.tier_live_bytes - sum(tmem.segments.live[segment] for segment in filling)
        frames = len(tmem.arena.used) - len(filling)
        return Space(frames * SEGMENT_BYTES, live, (tmem.arena.limit - tmem.arena.held) * SEGMENT_BYTES)

    # ---- inside the lock -------------------------------------------------------------------------------------------

    def _is_sparse(self, segment: SegmentId) -> bool:
        """Whether too little of it would be left; its dictionary would come along."""
        table = self._tmem.segments
        needed = table.live[segment] + (DICTIONARY_RECORD_BYTES if table.dictionary(segment) else 0)
        return is_sparse(needed, table.fill(segment)) and self.can_be_emptied(segment)

    def can_be_emptied(self, segment: SegmentId) -> bool:
        """Whether no damaged record was found in it, and it is not known that nothing is gained."""
        return self._tmem.segments.sequence(segment) not in self._left_alone

    def _by_dictionary(self, segments: Iterable[SegmentId]) -> Iterable[list[SegmentId]]:
        """`segments` that have the same dictionary, those of the first one first."""
        alike: dict[int, list[SegmentId]] = {}
        for segment in segments:
            alike.setdefault(self._tmem.segments.dictionary(segment), []).append(segment)
        return alike.values()

    def _dictionary(self, plan: Merge, source: Source, data: memoryview) -> Dictionary:
        """The dictionary of `plan`, which is that of `source` if it is not known. Raises Corrupt."""
        dictionaries = self._tmem.dictionaries
        found = dictionaries.known(plan.dictionary)
        if found is None:
            start = read_dictionary(data, source.seed)
            with self._tmem.lock:
                found = dictionaries.adopt(plan.dictionary, start)
        return found

    def _fitting(self, segments: Iterable[SegmentId]) -> list[SegmentId]:
        """As many of `segments`, from the first on, as one frame holds the live records of."""
        chosen: list[SegmentId] = []
        live = DICTIONARY_RECORD_BYTES
        for segment in segments:
            live += self._tmem.segments.live[segment]
            if chosen and live > SEGMENT_BYTES:
                break
            chosen.append(segment)
        return chosen

    def _victims(self) -> list[SegmentId]:
        """Segments on the tier, the best to clean first, whose live records fit into one; then in order of age."""
        table = self._tmem.segments
        now = table.next_sequence

        def worth(segment: SegmentId) -> float:
            return self.score(table.live[segment] / whole_blocks(table.fill(segment)), now - table.age(segment))

        ranked = sorted(self._tmem.occupancy.candidates(TIER), key=worth, reverse=True)
        alike = next(iter(self._by_dictionary(ranked)), [])
        return sorted(self._fitting(alike[:_MOST_SOURCES]), key=table.age)

    def _tier_source(self, segment: SegmentId) -> Source:
        table = self._tmem.segments
        self._tmem.occupancy.remove(segment)
        table.pin(segment)
        fill, seed = table.fill(segment), segment_seed(table.sequence(segment))
        return Source(segment, seed, fill, whole_blocks(fill), None, Extent(table.index(segment)))

    def _repoint(self, target: SegmentId, moves: list[tuple[int, int, int]]) -> None:
        handles, live, pages = self._tmem.slots.handles, self._tmem.segments.live, self._tmem.segments.pages
        is_cold = self._tmem.segments.lane(target) == LANE_COLD
        for slot, old, new in moves:
            if handles[slot] == old:
                handles[slot] = new
                source, size = handle_segment(old), handle_record_bytes(old)
                live[source] -= size
                pages[source] -= 1
                if is_cold and self._tmem.segments.lane(source) != LANE_COLD:
                    self._tmem.cold_pages += 1
                    self._tmem.cold_raw_pages += handle_tag(new) == RAW
                if (old ^ new) & ENCODING_MASK:
                    size = self._encoded_anew(old, new)
                live[target] += size
                pages[target] += 1

    def _encoded_anew(self, old: int, new: int) -> int:
        """A handle's record has another tag or length now; the bytes it takes."""
        tmem, size = self._tmem, handle_record_bytes(new)
        tmem.pages_by_tag[handle_tag(old)] -= 1
        tmem.pages_by_tag[handle_tag(new)] += 1
        tmem.compressed_bytes += handle_length(new) - handle_length(old)
        tmem.live_bytes += size - handle_record_bytes(old)
        return size

    def _finish_sources(self, plan: Merge, damaged: set[SegmentId], set_aside: bool = False) -> int:
        """Free the sources that nothing refers to any more; the others are as they were. How many frames go to the system.

        `set_aside`: nothing is gained with them before more of them has died.
        """
        tmem, table, goes = self._tmem, self._tmem.segments, 0
        file = tmem.occupancy.set_aside if set_aside else tmem.occupancy.add
        for source in reversed(plan.sources):
            segment, live = source.segment, table.live[source.segment]
            if plan.extent is not None:
                if table.unpin(segment) and not live:
                    tmem.emptied(segment)
                elif live and segment not in damaged:
                    file(TIER, segment, live, source.size_bytes)
                continue
            frame = Frame(table.index(segment))
            if live:
                if segment in damaged or set_aside:
                    self._left_alone.add(table.sequence(segment))
                table.move(segment, SEALED, frame)
                tmem.to_front(segment)
            else:
                table.move(segment, FREE, 0)
                goes += tmem.arena.give_back(frame)
        return goes

    def _finish_target(self, plan: Merge) -> int:
        """File the target, or free it where all of it died meanwhile. How many frames go to the system."""
        tmem, table, target = self._tmem, self._tmem.segments, plan.target
        live = table.live[target]
        if plan.extent is not None:
            if table.unpin(target) and not live:
                tmem.emptied(target)
            elif live:
                tmem.occupancy.add(TIER, target, live, whole_blocks(table.fill(target)))
        elif live:
            assert plan.frame is not None
            table.move(target, SEALED, plan.frame)
            tmem.to_front(target)
        else:
            return self._drop_target_in_ram(plan)
        return 0

    def _drop_target_in_ram(self, plan: Merge) -> int:
        assert plan.frame is not None and self._tmem.segments.state(plan.target) == OPEN
        self._tmem.segments.move(plan.target, FREE, 0)
        return self._tmem.arena.give_back(plan.frame)

    def _count(self, plan: Merge, copied: Copied) -> None:
        counts = self.counts
        if plan.extent is None:
            counts.compactions += 1
            counts.compacted_records += len(copied.moves)
            counts.gained_frames += len(copied.emptied) - 1
        else:
            counts.cleanings += 1
            counts.cleaned_segments += len(plan.sources)
            counts.cleaned_records += len(copied.moves)
            counts.cleaned_bytes += len(copied.data)
