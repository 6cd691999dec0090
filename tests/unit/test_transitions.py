"""Transitions: what belongs to each change of a segment's state."""

from __future__ import annotations

import pytest

from tmemfs.store.extents import Extents
from tmemfs.store.frames import Arena
from tmemfs.store.ledger import Ledger
from tmemfs.store.occupancy import TIER
from tmemfs.store.record import SegmentId, handle_of
from tmemfs.store.segments import CLEAN, FREE, LANE_RAW, MERGING, ON_TIER, OPEN, SEALED, WRITING, SegmentTable
from tmemfs.store.transitions import Transitions
from tmemfs.units import SEGMENT_BYTES


class Fixture:
    """Transitions over parts of their own, and the notices that were given."""

    def __init__(self) -> None:
        self.notices = 0
        self.segments = SegmentTable(16)
        self.arena, self.extents = Arena(4, 4, reserve=0), Extents(8)
        self.ledger = Ledger(self.segments)
        self.transitions = Transitions(self.segments, self.ledger, self.arena, self.extents, self._note)
        self.lane = self.transitions.lanes[LANE_RAW]

    def _note(self, frame_freed: bool) -> None:
        self.notices += 1

    def sealed(self, eighths: int = 8) -> SegmentId:
        """A sealed segment of which so much is live."""
        assert self.transitions.open_next(self.lane)
        segment = self.lane.segment
        for at in range(eighths * 30):
            self.ledger.store(handle_of(2, 4096, at * 4108, segment))
        self.segments.set_fill(segment, eighths * 30 * 4108)
        self.transitions.seal(self.lane)
        return segment

    def clean(self, eighths: int = 8) -> SegmentId:
        """A segment in RAM that lies on the tier as well."""
        segment, extent = self.sealed(eighths), self.extents.take(SEGMENT_BYTES)
        assert extent is not None
        self.transitions.withdraw(segment)
        self.segments.move(segment, WRITING, self.segments.frame(segment))
        self.transitions.keep_copy(segment, self.segments.frame(segment), extent)
        return segment

    def drop_all(self, segment: SegmentId) -> None:
        """No slot refers to it any more."""
        for at in range(self.ledger.pages[segment]):
            self.transitions.drop(handle_of(2, 4096, at * 4108, segment))


@pytest.fixture
def parts() -> Fixture:
    return Fixture()


def test_what_is_in_line_is_filed_by_its_live_share_and_nothing_else(parts: Fixture) -> None:
    half, full = parts.sealed(4), parts.sealed(8)
    assert list(parts.lane.sealed) == [half, full]
    assert list(parts.ledger.occupancy.emptiest(LANE_RAW, 1.0)) == [half, full]
    parts.transitions.withdraw(half)
    assert list(parts.lane.sealed) == list(parts.ledger.occupancy.emptiest(LANE_RAW, 1.0)) == [full]


def test_a_segment_that_is_sealed_without_a_page_is_freed(parts: Fixture) -> None:
    segment = parts.sealed(0)
    assert (parts.segments.state(segment), parts.arena.used, list(parts.lane.sealed)) == (FREE, set(), [])


def test_no_segment_is_opened_or_sealed_without_a_frame_and_others_are_told(parts: Fixture) -> None:
    while parts.transitions.open_next(parts.lane):
        parts.ledger.store(handle_of(2, 4096, 0, parts.lane.segment))
    last, told = parts.lane.segment, parts.notices
    assert not parts.transitions.open_next(parts.lane)
    assert (parts.lane.segment, parts.segments.state(last), parts.notices) == (last, OPEN, told + 1)


def test_what_stays_in_ram_after_a_merge_or_a_write_is_next_in_line(parts: Fixture) -> None:
    first, second = parts.sealed(), parts.sealed()
    parts.transitions.begin_merge(second)
    assert parts.segments.state(second) == MERGING and list(parts.lane.sealed) == [first]
    parts.transitions.keep_in_ram(second, parts.segments.frame(second))
    assert parts.segments.state(second) == SEALED and list(parts.lane.sealed) == [second, first]
    assert set(parts.ledger.occupancy.emptiest(LANE_RAW, 1.0)) == {first, second}


@pytest.mark.parametrize("state", [MERGING, WRITING])
def test_a_segment_that_becomes_empty_while_it_is_merged_or_written_is_not_freed_by_that(parts: Fixture, state: int) -> None:
    segment = parts.sealed()
    parts.transitions.withdraw(segment)
    parts.segments.move(segment, state, parts.segments.frame(segment))
    parts.drop_all(segment)
    assert parts.segments.state(segment) == state and len(parts.arena.used) == 1


def test_a_pinned_segment_that_became_empty_is_freed_with_the_last_pin(parts: Fixture) -> None:
    segment = parts.sealed()
    extent = parts.extents.take(4096)
    assert extent is not None
    parts.transitions.withdraw(segment)
    for state in (WRITING, ON_TIER):
        parts.segments.move(segment, state, extent)
    parts.ledger.written_back(segment)
    parts.segments.pin(segment)
    parts.segments.pin(segment)
    parts.drop_all(segment)
    assert parts.transitions.unpin(segment) is False and parts.segments.state(segment) == ON_TIER
    assert parts.transitions.unpin(segment) is True and parts.segments.state(segment) == FREE
    assert parts.extents.has_retired and not list(parts.ledger.occupancy.candidates(TIER))


def test_a_clean_copy_leaves_ram_for_the_next_segment_without_a_write(parts: Fixture) -> None:
    old, young = parts.clean(), parts.clean()
    parts.sealed()
    parts.sealed()
    assert not parts.arena.has_free_frame
    extent = parts.segments.extent(old)
    assert parts.transitions.open_next(parts.lane)
    assert (parts.segments.state(old), parts.segments.state(young)) == (ON_TIER, CLEAN)
    assert parts.segments.extent(old) == extent and parts.segments.base[old] == -1
    assert list(parts.ledger.occupancy.candidates(TIER)) == [old]


def test_a_clean_copy_stays_while_more_is_held_than_the_limit_allows(parts: Fixture) -> None:
    segment = parts.clean()
    parts.arena.set_limit(0)
    assert not parts.transitions.open_next(parts.lane) and parts.segments.state(segment) == CLEAN


def test_a_clean_copy_that_was_loaded_from_has_a_second_chance(parts: Fixture) -> None:
    loaded, other = parts.clean(), parts.clean()
    parts.segments.loaded[loaded] = 1
    assert [parts.transitions.clean.next_victim()] == [other]
    parts.transitions.drop_copy(other)
    assert parts.transitions.clean.next_victim() == loaded


def test_a_clean_segment_that_becomes_empty_gives_back_frame_and_extent(parts: Fixture) -> None:
    segment = parts.clean(2)
    live = parts.ledger.live[segment]
    parts.drop_all(segment)
    assert (parts.segments.state(segment), parts.arena.used, parts.extents.out) == (FREE, set(), {})
    clean = parts.transitions.clean
    assert (len(clean), clean.tier_bytes, clean.died_bytes, clean.dropped) == (0, 0, live, 0)
