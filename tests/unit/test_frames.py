"""The arena: no frame in two hands, never more memory than the limit, and every frame still there at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.examples import FACTOR
from tmemfs.store.frames import RESERVE_FRAMES, Arena, Frame
from tmemfs.units import SEGMENT_BYTES

FRAMES: Final = 12


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Twelve frames, at most eight of them held, two in reserve."""
    arena = Arena(FRAMES, 8, reserve=2)
    yield arena
    arena.region.close()


def take(arena: Arena, count: int) -> list[Frame]:
    taken = [arena.take() for _ in range(count)]
    assert None not in taken
    return [frame for frame in taken if frame is not None]


def fill_reserve(arena: Arena) -> int:
    """Populate as long as it is wanted; how many frames that took."""
    count = 0
    while arena.wants_populating:
        arena.populated(arena.take_cold(), ok=True)
        count += 1
    return count


def give_back(arena: Arena, frames: list[Frame]) -> list[bool]:
    return [arena.give_back(frame) for frame in frames]


def test_frames_are_taken_up_to_the_limit(arena: Arena) -> None:
    assert len(set(take(arena, 8))) == 8
    assert (arena.take(), arena.has_free_frame, arena.held, arena.peak) == (None, False, 8, 8)


def test_frames_are_taken_up_to_their_number() -> None:
    arena = Arena(3, 100)
    assert sorted(take(arena, 3)) == [0, 1, 2]
    assert (arena.take(), arena.has_free_frame) == (None, False)
    arena.region.close()


def test_a_new_arena_has_no_memory_behind_it(arena: Arena) -> None:
    assert (arena.held, arena.idle, arena.peak, arena.region.resident_bytes()) == (0, 0, 0, 0)


def test_the_reserve_is_filled_and_taken_first(arena: Arena) -> None:
    assert fill_reserve(arena) == 2
    assert (arena.held, arena.idle) == (2, 2)
    assert sorted(take(arena, 2)) == [0, 1]
    assert (arena.held, arena.idle) == (2, 0)


def test_the_reserve_is_not_filled_above_the_limit(arena: Arena) -> None:
    take(arena, 7)
    assert fill_reserve(arena) == 1
    assert (arena.held, arena.wants_populating) == (8, False)


def test_a_frame_being_populated_is_held_and_wanted_once(arena: Arena) -> None:
    take(arena, 7)
    frame = arena.take_cold()
    assert (arena.held, arena.wants_populating, arena.take()) == (8, False, None)
    arena.populated(frame, ok=True)
    assert arena.take() == frame


def test_a_frame_that_could_not_be_populated_is_cold_again(arena: Arena) -> None:
    frame = arena.take_cold()
    arena.populated(frame, ok=False)
    assert (arena.held, arena.wants_populating) == (0, True)
    assert arena.take_cold() == frame


def test_a_frame_given_back_fills_a_short_reserve(arena: Arena) -> None:
    used = take(arena, 4)
    assert give_back(arena, used) == [False, False, True, True]
    assert (arena.held, arena.idle, arena.used) == (4, 4, set())
    assert arena.take_releasing(9) == tuple(used[2:])


def test_a_frame_queued_for_release_is_used_before_a_cold_one(arena: Arena) -> None:
    used = take(arena, 5)
    give_back(arena, used)
    assert set(take(arena, 5)) == set(used)
    assert arena.held == 5


def test_memory_counts_until_it_has_gone(arena: Arena) -> None:
    give_back(arena, take(arena, 6))
    taken = arena.take_releasing(3)
    assert (len(taken), arena.held) == (3, 6)
    arena.released(taken)
    assert arena.held == 3


def test_memory_that_could_not_go_is_queued_again(arena: Arena) -> None:
    give_back(arena, take(arena, 4))
    taken = arena.take_releasing(9)
    arena.keep(taken)
    assert arena.held == 4
    assert arena.take_releasing(9) == taken


def test_a_frame_being_released_is_not_taken(arena: Arena) -> None:
    used = take(arena, 8)
    give_back(arena, used)
    releasing = arena.take_releasing(9)
    assert set(take(arena, 2)) == set(used) - set(releasing)
    assert (arena.take(), arena.has_free_frame) == (None, False)
    arena.released(releasing)
    assert arena.has_free_frame


def test_a_lower_limit_sheds_ready_frames_only(arena: Arena) -> None:
    used = take(arena, 4)
    fill_reserve(arena)
    arena.limit = 5
    arena.shed_ready()
    assert (arena.held, arena.used) == (6, set(used))
    arena.released(arena.take_releasing(9))
    assert (arena.held, arena.idle) == (5, 1)


def test_nothing_is_shed_for_what_is_on_its_way_out_anyway(arena: Arena) -> None:
    give_back(arena, take(arena, 6))
    arena.take_releasing(2)
    arena.limit = 2
    arena.shed_ready()
    assert len(arena.take_releasing(9)) == 2
    assert arena.idle == 6


def test_above_a_lowered_limit_nothing_is_faulted_in_and_nothing_queued_for_release_is_used_again(arena: Arena) -> None:
    used = take(arena, 8)
    give_back(arena, used)
    take(arena, 2)
    arena.limit = 3
    arena.shed_ready()
    assert (arena.held, arena.wants_populating, arena.has_free_frame, arena.take()) == (8, False, False, None)


def test_a_ready_frame_is_taken_above_a_lowered_limit_because_that_holds_no_more(arena: Arena) -> None:
    # Not what the arena's invariant 2 says ("then no frame is taken until it is true"), but harmless: what is used and ready
    # is within the limit, and what is above it is being released.
    used = take(arena, 6)
    fill_reserve(arena)
    give_back(arena, used[:3])
    arena.limit = 5
    arena.shed_ready()
    assert arena.held == 8
    assert len(take(arena, 2)) == 2
    assert (arena.held, arena.take()) == (8, None)


def test_adopted_frames_are_used_and_the_ones_between_them_free(arena: Arena) -> None:
    arena.adopt({Frame(1), Frame(4)})
    assert (arena.used, arena.held, arena.peak) == ({1, 4}, 2, 2)
    assert sorted(take(arena, 6)) == [0, 2, 3, 5, 6, 7]
    assert arena.take() is None


def test_adopting_more_than_the_limit_leaves_no_free_frame(arena: Arena) -> None:
    arena.adopt({Frame(number) for number in range(FRAMES)})
    assert (arena.held, arena.has_free_frame, arena.wants_populating, arena.take()) == (FRAMES, False, False, None)


def test_frames_that_were_left_with_memory_are_ready_or_released(arena: Arena) -> None:
    arena.adopt({Frame(1), Frame(4)})
    arena.adopt_resident({Frame(number): SEGMENT_BYTES for number in (0, 3, 7)} | {Frame(9): 4096})
    assert (arena.used, arena.held, arena.idle, arena.peak) == ({1, 4}, 6, 4, 6)
    assert not arena.wants_populating  # two of the whole ones are ready
    assert arena.take_releasing(1) == (9,)  # which is not whole, and so the last that a store would want
    assert arena.take_releasing(9) == (7,)
    arena.released((Frame(9), Frame(7)))
    assert sorted(take(arena, 6)) == [0, 3, 6, 7, 8, 9]
    assert arena.take() is None


def test_frames_that_were_left_with_memory_count_also_above_the_limit(arena: Arena) -> None:
    arena.adopt({Frame(number) for number in range(7)})
    arena.adopt_resident({Frame(number): SEGMENT_BYTES for number in range(7, FRAMES)})
    assert (arena.held, arena.wants_populating) == (FRAMES, False)
    assert [arena.take(), arena.take()] == [7, None]  # the one that the limit leaves ready
    arena.released(arena.take_releasing(9))
    assert (arena.held, arena.has_free_frame) == (8, False)


def test_a_frame_is_a_segment_of_the_region(arena: Arena) -> None:
    arena.frame_view(Frame(3))[:] = b"\x55" * SEGMENT_BYTES
    assert bytes(arena.view[3 * SEGMENT_BYTES - 1 : 3 * SEGMENT_BYTES + 1]) == b"\x00\x55"
    assert bytes(arena.view[4 * SEGMENT_BYTES - 1 : 4 * SEGMENT_BYTES + 1]) == b"\x55\x00"
    assert len(arena.frame_view(Frame(3), 8192)) == 8192


def test_the_reserve_has_two_frames_a_lane() -> None:
    arena = Arena(FRAMES, 8)
    assert fill_reserve(arena) == RESERVE_FRAMES == 4
    arena.region.close()


class ArenaMachine(RuleBasedStateMachine):
    """Any sequence of what the store and the jobs do with frames. `hands` are the frames out of the arena's own lists."""

    @initialize(limit=st.integers(1, FRAMES), reserve=st.integers(0, 4))
    def start(self, limit: int, reserve: int) -> None:
        """A new arena."""
        self.arena = Arena(FRAMES, limit, reserve=reserve)
        self.used: set[Frame] = set()
        self.releasing: list[tuple[Frame, ...]] = []
        self.populating: list[Frame] = []
        self.most = 0
        self.ceiling = limit

    @property
    def hands(self) -> set[Frame]:
        """Frames that must not be given out."""
        return self.used | set(self.populating) | {frame for frames in self.releasing for frame in frames}

    @rule()
    def take(self) -> None:
        """A segment is opened."""
        had_room, before = self.arena.has_free_frame, self.hands
        frame = self.arena.take()
        assert (frame is not None) == had_room
        if frame is not None:
            assert frame not in before and 0 <= frame < FRAMES
            self.used.add(frame)

    @precondition(lambda self: self.used)
    @rule(which=st.integers(0, FRAMES))
    def give_back(self, which: int) -> None:
        """A segment has gone."""
        frame = sorted(self.used)[which % len(self.used)]
        held = self.arena.held
        self.used.remove(frame)
        self.arena.give_back(frame)
        assert self.arena.held == held

    @rule(most=st.integers(0, 3))
    def take_releasing(self, most: int) -> None:
        """Begin to give memory back."""
        before = self.hands
        frames = self.arena.take_releasing(most)
        assert len(frames) <= most and not before & set(frames)
        self.releasing.append(frames)

    @precondition(lambda self: self.releasing)
    @rule(ok=st.booleans())
    def finish_release(self, ok: bool) -> None:
        """The memory is released, or cannot be."""
        frames, held = self.releasing.pop(0), self.arena.held
        (self.arena.released if ok else self.arena.keep)(frames)
        assert self.arena.held == held - len(frames) * ok

    @precondition(lambda self: self.arena.wants_populating)
    @rule()
    def take_cold(self) -> None:
        """Begin to fault a frame in."""
        before = self.hands
        frame = self.arena.take_cold()
        assert frame not in before
        self.populating.append(frame)

    @precondition(lambda self: self.populating)
    @rule(ok=st.booleans())
    def finish_populate(self, ok: bool) -> None:
        """The frame is faulted in, or there is no memory."""
        self.arena.populated(self.populating.pop(0), ok)

    @rule(limit=st.integers(0, FRAMES))
    def set_limit(self, limit: int) -> None:
        """A limit that is lowered below what is held lets it be held until it is released."""
        self.arena.limit = limit
        self.arena.shed_ready()
        self.ceiling = max(self.ceiling, limit)

    @invariant()
    def held_is_within_the_limit(self) -> None:
        """And where the limit was lowered below it, held only falls."""
        held = self.arena.held
        assert held <= self.ceiling
        self.ceiling = max(self.arena.limit, held)
        self.most = max(self.most, held)
        assert self.arena.peak == self.most
        assert self.arena.used == self.used
        assert held == len(self.used) + self.arena.idle

    def teardown(self) -> None:
        """Every frame is in one condition: all can be taken once, when all came back."""
        for frame in self.populating:
            self.arena.populated(frame, ok=True)
        for frames in self.releasing:
            self.arena.keep(frames)
        self.arena.limit = FRAMES
        while (taken := self.arena.take()) is not None:
            assert taken not in self.used
            self.used.add(taken)
        assert self.used == set(range(FRAMES))
        self.arena.region.close()


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=60 * FACTOR, stateful_step_count=40, deadline=None)


def test_the_spare_frame_is_for_merges_alone() -> None:
    arena = Arena(8, 4, spare=1)
    arena.populated(arena.take_cold(), ok=True)
    assert [arena.take() is not None for _ in range(4)] == [True, True, True, False]
    assert not arena.has_free_frame and arena.held == 4
    assert arena.take_spare() is not None and arena.held == 4
    assert arena.take_spare() is None
