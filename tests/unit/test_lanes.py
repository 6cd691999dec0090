"""A lane: one open segment or none, and its sealed ones in order of age."""

from __future__ import annotations

from tmemfs.store.frames import Frame
from tmemfs.store.lanes import Lane
from tmemfs.store.record import SegmentId, segment_seed
from tmemfs.store.segments import LANE_RAW
from tmemfs.units import SEGMENT_BYTES


def new_lane() -> Lane:
    return Lane(LANE_RAW)


def test_nothing_fits_into_a_lane_without_an_open_segment() -> None:
    lane = new_lane()
    assert (lane.is_open, lane.fill, lane.oldest, lane.index) == (False, SEGMENT_BYTES, None, LANE_RAW)


def test_an_open_segment_is_empty_and_knows_its_frame_and_seed() -> None:
    lane = new_lane()
    lane.start(SegmentId(7), Frame(3), sequence=9)
    assert (lane.is_open, lane.segment, lane.base, lane.fill) == (True, 7, 3 * SEGMENT_BYTES, 0)
    assert lane.seed == segment_seed(9)


def test_a_closed_lane_is_as_a_new_one_but_for_its_sealed_segments() -> None:
    lane = new_lane()
    lane.start(SegmentId(7), Frame(3), sequence=9)
    lane.append(SegmentId(7))
    lane.close()
    assert (lane.is_open, lane.segment, lane.base, lane.fill, lane.seed) == (False, 0, 0, SEGMENT_BYTES, 0)
    assert lane.oldest == 7


def test_the_oldest_is_next_unless_another_one_failed_to_be_written() -> None:
    lane = new_lane()
    for segment in map(SegmentId, (4, 2, 9)):
        lane.append(segment)
    assert lane.oldest == 4
    lane.remove(SegmentId(4))
    assert lane.oldest == 2
    lane.to_front(SegmentId(4))
    assert list(lane.sealed) == [4, 2, 9]
    lane.remove(SegmentId(9))
    lane.to_front(SegmentId(9))
    assert list(lane.sealed) == [9, 4, 2]
