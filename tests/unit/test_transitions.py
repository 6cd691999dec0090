"""Transitions: what belongs to each change of a segment's state."""

from __future__ import annotations

import pytest

from tmemfs.store.extents import Extents
from tmemfs.store.frames import Arena, Frame
from tmemfs.store.ledger import Ledger
from tmemfs.store.occupancy import TIER
from tmemfs.store.record import SegmentId, handle_of
from tmemfs.store.segments import FREE, LANE_RAW, MERGING, ON_TIER, OPEN, SEALED, WRITING, SegmentTable
from tmemfs.store.transitions import Transitions


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
    parts.transitions.keep_in_ram(second, Frame(parts.segments.index(second)))
    assert parts.segments.state(second) == SEALED and list(parts.lane.sealed) == [second, first]
    assert set(parts.ledger.occupancy.emptiest(LANE_RAW, 1.0)) == {first, second}


@pytest.mark.parametrize("state", [MERGING, WRITING])
def test_a_segment_that_becomes_empty_while_it_is_merged_or_written_is_not_freed_by_that(parts: Fixture, state: int) -> None:
    segment = parts.sealed()
    parts.transitions.withdraw(segment)
    parts.segments.move(segment, state, parts.segments.index(segment))
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
