"""The extents: each in one condition, and disk space counted to the byte."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmemfs.store.extents import Extents
from tmemfs.tiers.tier import Extent
from tmemfs.units import SEGMENT_BYTES


def test_the_lowest_free_extent_is_taken_first() -> None:
    extents = Extents(8)
    assert [extents.take(4096) for _ in range(4)] == [0, 1, 2, 3]
    discard(extents, 2, 0)
    assert [extents.take(4096) for _ in range(3)] == [0, 2, 4]


def discard(extents: Extents, *numbers: int) -> None:
    for number in numbers:
        extents.retire(Extent(number))
    extents.discarded(extents.take_retired(len(numbers)), ok=True)


def test_extents_end_with_their_number() -> None:
    extents = Extents(2, limit_bytes=100 * SEGMENT_BYTES)
    assert [extents.take(4096) for _ in range(3)] == [0, 1, None]


def test_extents_are_limited_to_their_size_unless_told() -> None:
    assert Extents(3).limit_bytes == 3 * SEGMENT_BYTES
    assert Extents(3, 0).take(4096) is None


def test_the_limit_is_in_bytes_of_whole_blocks() -> None:
    extents = Extents(8, limit_bytes=10 * 4096)
    assert extents.take(6 * 4096) == 0
    assert extents.take(5 * 4096) is None
    assert extents.take(4 * 4096) == 1
    assert extents.held_bytes == 10 * 4096
    assert extents.take(4096) is None


def test_a_limit_below_what_is_out_takes_nothing_back() -> None:
    extents = Extents(8)
    extents.take(SEGMENT_BYTES)
    extents.limit_bytes = 0
    assert (extents.held_bytes, extents.out, extents.take(4096)) == (SEGMENT_BYTES, {0: SEGMENT_BYTES}, None)


def test_a_retired_extent_is_held_until_its_hole_is_punched() -> None:
    extents = Extents(1)
    extents.take(8192)
    extents.retire(Extent(0))
    assert (extents.held_bytes, extents.retired_bytes, extents.out, extents.take(4096)) == (8192, 8192, {}, None)
    taken = extents.take_retired(9)
    assert (extents.held_bytes, extents.retired_bytes, extents.take(4096)) == (8192, 8192, None)
    extents.discarded(taken, ok=True)
    assert (extents.held_bytes, extents.retired_bytes, extents.take(4096)) == (0, 0, 0)


def test_a_hole_that_could_not_be_punched_is_written_over_or_tried_again() -> None:
    extents = Extents(3)
    for _ in range(2):
        extents.take(8192)
    fail_to_discard(extents, 1, 0)
    assert (extents.held_bytes, extents.retired_bytes, extents.take_retired(9)) == (16384, 16384, ())
    assert extents.take(4096) == 0  # and no free one, which would need more disk
    assert (extents.held_bytes, extents.retired_bytes) == (12288, 8192)
    extents.punch_again()
    assert extents.take_retired(9) == (1,) and not extents.has_stale


def fail_to_discard(extents: Extents, *numbers: int) -> None:
    for number in numbers:
        extents.retire(Extent(number))
    extents.discarded(extents.take_retired(len(numbers)), ok=False)


def test_extents_whose_holes_could_not_be_punched_keep_no_segment_away() -> None:
    """Also where the segments that come are larger than those that were there."""
    extents = Extents(4, limit_bytes=2 * SEGMENT_BYTES, reserve_bytes=SEGMENT_BYTES)
    before = extents.free_bytes
    for _ in range(4):
        extents.take(SEGMENT_BYTES // 4, for_cleaning=True)
    fail_to_discard(extents, 0, 1, 2, 3)
    assert extents.free_bytes == before
    assert extents.take(SEGMENT_BYTES) == 0 and extents.take(SEGMENT_BYTES) is None


def test_without_holes_an_extent_is_free_as_soon_as_it_is_empty() -> None:
    extents = Extents(4)
    for _ in range(4):
        extents.take(4096)
    extents.retire(Extent(3))
    being_punched = extents.take_retired(1)
    fail_to_discard(extents, 2)
    extents.retire(Extent(1))
    extents.punch_none()
    assert (extents.held_bytes, extents.retired_bytes, extents.has_retired, extents.has_stale) == (8192, 4096, False, False)
    extents.retire(Extent(0))
    extents.discarded(being_punched, ok=False)
    assert (extents.held_bytes, extents.retired_bytes) == (0, 0)
    assert [extents.take(4096) for _ in range(4)] == [0, 1, 2, 3]


def test_what_was_retired_first_is_punched_first_in_order_and_no_more_than_asked_for() -> None:
    extents = Extents(8)
    for _ in range(5):
        extents.take(4096)
    for number in (4, 1, 3, 0):
        extents.retire(Extent(number))
    assert [extents.take_retired(2), extents.take_retired(9), extents.take_retired(9)] == [(1, 4), (0, 3), ()]


def test_only_what_is_out_can_be_retired() -> None:
    with pytest.raises(KeyError):
        Extents(2).retire(Extent(0))


def touched(count: int) -> memoryview:
    """The word that says how many extents were ever taken."""
    return memoryview(array("Q", [count]))


def test_adopted_extents_are_out_and_the_ones_between_them_free() -> None:
    extents = Extents(6)
    extents.adopt({Extent(1): 4096, Extent(4): 8192}, touched(0))
    assert extents.held_bytes == 12288
    assert [extents.take(4096) for _ in range(5)] == [0, 2, 3, 5, None]


def test_extents_that_a_killed_process_may_have_written_to_are_punched() -> None:
    extents, word = Extents(6), touched(0)
    extents.adopt({}, word)
    for number in range(4):
        assert extents.take(4096) == number and word[0] == number + 1
    extents.retire(Extent(0))
    extents.discarded(extents.take_retired(1), ok=True)
    assert extents.take(4096) == 0 and word[0] == 4  # which was taken before
    later = Extents(6)
    later.adopt({Extent(2): 4096}, word)
    assert later.has_stale and (later.held_bytes, later.retired_bytes) == (4096, 0)
    later.punch_again()
    assert later.take_retired(9) == (0, 1, 3)


def test_extents_that_were_perhaps_written_to_keep_no_segment_away() -> None:
    extents = Extents(6, limit_bytes=5 * SEGMENT_BYTES)
    extents.adopt({Extent(1): SEGMENT_BYTES}, touched(6))
    assert [extents.take(SEGMENT_BYTES) for _ in range(5)] == [0, 2, 3, 4, None]


@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "retire", "plan", "done", "failed", "limit", "again", "none"]), st.integers(0, 20)),
        max_size=60,
    )
)
def test_every_extent_is_free_out_retired_or_stale_and_counted_until_it_is_free(steps: list[tuple[str, int]]) -> None:
    extents = Extents(5)
    out: dict[Extent, int] = {}
    retired: dict[Extent, int] = {}
    planned: dict[Extent, int] = {}
    stale: dict[Extent, int] = {}
    has_holes = True
    for step, number in steps:
        if step == "take":
            extent = extents.take(number * 4096)
            free = set(map(Extent, range(5))) - out.keys() - retired.keys() - planned.keys() - stale.keys()
            fits = extents.limit_bytes >= sum((*out.values(), *retired.values(), *planned.values())) + number * 4096
            assert extent == (next(iter(stale), min(free, default=None)) if fits else None)
            if extent is not None:
                stale.pop(extent, None)
                out[extent] = number * 4096
        elif step == "retire" and out:
            extent = sorted(out)[number % len(out)]
            extents.retire(extent)
            size = out.pop(extent)
            if has_holes:
                retired[extent] = size
        elif step == "plan":
            taken = extents.take_retired(number)
            assert list(taken) == sorted(list(retired)[:number])
            planned |= {extent: retired.pop(extent) for extent in taken}
        elif step in ("done", "failed") and planned:
            extents.discarded(tuple(planned), ok=step == "done")
            if step == "failed" and has_holes:
                stale |= planned
            planned = {}
        elif step == "again":
            extents.punch_again()
            retired |= stale
            stale = {}
        elif step == "none" and number == 0:
            extents.punch_none()
            has_holes, retired, stale = False, {}, {}
        elif step == "limit":
            extents.limit_bytes = number * 4096
        assert extents.out == out
        assert extents.retired_bytes == sum(retired.values()) + sum(planned.values()) + sum(stale.values())
        assert extents.has_stale == bool(stale)
        assert extents.held_bytes == sum(out.values()) + extents.retired_bytes


def test_the_reserve_is_for_cleaning_alone() -> None:
    extents = Extents(8, 6 * SEGMENT_BYTES, reserve_bytes=2 * SEGMENT_BYTES)
    assert extents.free_bytes == 4 * SEGMENT_BYTES
    assert [extents.take(SEGMENT_BYTES) for _ in range(5)] == [0, 1, 2, 3, None]
    assert extents.free_bytes == 0
    assert [extents.take(SEGMENT_BYTES, for_cleaning=True) for _ in range(3)] == [4, 5, None]


def test_the_reserve_is_of_the_extents_too() -> None:
    extents = Extents(4, 100 * SEGMENT_BYTES, reserve_bytes=2 * SEGMENT_BYTES)
    assert [extents.take(4096) for _ in range(3)] == [0, 1, None]
    assert extents.take(4096, for_cleaning=True) == 2


def test_an_extent_that_needs_less_than_was_taken_gives_the_rest_back() -> None:
    extents = Extents(4)
    extent = extents.take(SEGMENT_BYTES)
    assert extent is not None
    extents.resize(extent, 8192)
    assert (extents.held_bytes, extents.out) == (8192, {extent: 8192})
