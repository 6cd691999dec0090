"""The store: what it says when it is full, which page leaves first, what a version is, and what is left of one that was killed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from tests.parts import FaultyTier, Regions, merge, new_tmem, page_of
from tmemfs.errors import BackingFull, Corrupt, TierError, TmemfsError
from tmemfs.pages.reader import Reader
from tmemfs.store import record as record_module
from tmemfs.store.append import Appender
from tmemfs.store.codec import LZ4, RAW, ZERO_PAGE, Packed, encode, parse_codec
from tmemfs.store.consistency import check
from tmemfs.store.ledger import (
    COLD_PAGES,
    COLD_RAW_PAGES,
    COMPRESSED_BYTES,
    LIVE_BYTES,
    ONLY_POOL,
    TIER_LIVE_BYTES,
    TIER_PAGES,
)
from tmemfs.store.occupancy import TIER
from tmemfs.store.plans import WriteBack
from tmemfs.store.record import (
    RECORD_HEADER_BYTES,
    ZERO_HANDLE,
    handle_length,
    handle_of,
    handle_offset,
    handle_segment,
    whole_blocks,
)
from tmemfs.store.recovery import recount
from tmemfs.store.segments import FREE, LANES, ON_TIER, OPEN, SEALED, WRITING
from tmemfs.store.statistics import lane_pages, segment_lines, statistics
from tmemfs.store.tmem import Tmem
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES

SLOTS = 2048
#: Raw pages of one segment.
FULL = 255
LZ4_CODEC = parse_codec("lz4")


class Killed(BaseException):
    """The process ended here."""


class Place:
    """A store over regions that outlive it, its tier, and what every slot has to give."""

    def __init__(self, frames: int = 8, extents: int = 8) -> None:
        self.regions = Regions.new(SLOTS, frames, extents)
        self.tier = FaultyTier()
        self.pages: dict[int, bytes] = {}
        self.start()

    def start(self) -> None:
        """A store from the regions as they are: the only one, or after a kill the next one."""
        self.tmem = self.regions.start(self.regions.frames, SLOTS)
        self.reader = Reader(self.tmem, self.tier)

    def store(self, first: int, pages: list[bytes]) -> int:
        """Store pages; what was stored is what has to be there."""
        stored = self.tmem.store(first, packed(pages))
        self.pages |= {first + number: page for number, page in enumerate(pages[:stored])}
        return stored

    def write_back(self) -> WriteBack:
        """Write the next victim back."""
        plan = planned(self.tmem)
        self.tier.write(plan.extent, plan.data, plan.sequence)
        self.tmem.commit_write_back(plan)
        return plan

    def load(self, slot: int) -> bytes:
        """The page, wherever it is."""
        return self.reader.perform(self.tmem.plan_read(slot, 1))[0]

    def verify(self) -> None:
        """Every page is as it has to be, and the store's figures as a scan finds them."""
        check(self.tmem)
        for first in range(0, SLOTS, 32):
            expected = [self.pages.get(slot, ZERO_PAGE) for slot in range(first, first + 32)]
            assert self.reader.perform(self.tmem.plan_read(first, 32)) == expected, f"slots from {first} on"
        assert self.tmem.pages_stored == len(self.pages)


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.regions.close()


@pytest.fixture
def tmem(place: Place) -> Tmem:
    return place.tmem


@cache
def encoded(page: bytes) -> Packed:
    return encode(page, LZ4_CODEC)


cached_page_of = cache(page_of)


def packed(pages: list[bytes]) -> list[Packed]:
    return [encoded(page) for page in pages]


def raw(first: int, count: int) -> list[bytes]:
    return [cached_page_of("raw", number) for number in range(first, first + count)]


def halves(first: int, count: int) -> list[bytes]:
    return [cached_page_of("half", number) for number in range(first, first + count)]


def planned(tmem: Tmem, include_open: bool = True) -> WriteBack:
    plan = tmem.plan_write_back(include_open)
    assert plan is not None
    return plan


# ---- a full pool ---------------------------------------------------------------------------------------------------


def test_a_store_stops_at_a_full_pool_and_tells_how_far_it_came(place: Place) -> None:
    place.tmem.limit_pool(2 * SEGMENT_BYTES)
    assert place.store(100, raw(0, 600)) == 2 * FULL
    assert not place.tmem.arena.has_free_frame
    place.verify()


def test_a_store_continues_where_it_stopped(place: Place) -> None:
    place.tmem.limit_pool(2 * SEGMENT_BYTES)
    pages = raw(0, 600)
    assert place.store(0, pages) == 510
    place.write_back()
    assert place.tmem.store(0, packed(pages), 510) == 600
    place.pages |= dict(enumerate(pages))
    place.verify()
    assert place.tmem.counts.stores == 600


def test_what_found_no_free_frame_has_its_old_page(place: Place) -> None:
    place.store(0, raw(0, 10))
    place.tmem.limit_pool(SEGMENT_BYTES)
    assert place.store(1000, raw(1000, FULL - 10)) == FULL - 10
    assert place.store(5, raw(2000, 1)) == 0
    assert place.tmem.load(5) == page_of("raw", 5)
    place.verify()


def test_pages_behind_one_that_found_no_free_frame_are_not_stored_out_of_order(place: Place) -> None:
    place.tmem.limit_pool(0)
    assert place.store(0, [ZERO_PAGE, ZERO_PAGE, page_of("half", 1), ZERO_PAGE]) == 2
    assert place.tmem.pages_stored == 2


def test_zero_pages_need_no_frame(place: Place) -> None:
    place.tmem.limit_pool(0)
    assert place.store(0, [ZERO_PAGE] * 100) == 100
    assert (place.tmem.pool_bytes, place.tmem.pages_stored) == (0, 100)


def test_a_page_fits_into_the_open_segment_of_a_full_pool(place: Place) -> None:
    place.tmem.limit_pool(SEGMENT_BYTES)
    place.store(0, halves(0, 1))
    assert place.store(1, halves(1, 1)) == 1
    assert place.store(2, raw(2, 1)) == 0  # another lane, which would need a frame of its own
    place.verify()


def test_a_limit_is_whole_frames_and_no_more_than_there_are(tmem: Tmem) -> None:
    tmem.limit_pool(3 * SEGMENT_BYTES + 4096)
    assert tmem.arena.limit == 3
    tmem.limit_pool(1000 * SEGMENT_BYTES)
    assert tmem.arena.limit == tmem.arena.frames == 8


def test_a_lower_limit_sheds_the_reserve(tmem: Tmem) -> None:
    for _ in range(4):
        plan = tmem.reclaim.plan_populate()
        assert plan is not None
        tmem.reclaim.commit_populate(plan)
    tmem.limit_pool(SEGMENT_BYTES)
    release = tmem.reclaim.plan_release()
    assert release is not None and len(release.frames) == 3


# ---- versions ------------------------------------------------------------------------------------------------------


def test_a_store_with_the_version_of_now_is_done(place: Place) -> None:
    place.store(7, halves(0, 1))
    assert place.tmem.store_if(7, place.tmem.version(7), encode(page_of("half", 1), LZ4_CODEC)) is True
    assert place.tmem.load(7) == page_of("half", 1)


@pytest.mark.parametrize("kind", ["half", "raw", "fill", "zero"])
def test_a_store_with_the_version_of_an_older_page_changes_nothing(place: Place, kind: Any) -> None:
    place.store(7, halves(0, 1))
    old = place.tmem.version(7)
    place.store(7, [page_of(kind, 1)])
    assert place.tmem.store_if(7, old, encode(page_of("half", 2), LZ4_CODEC)) is False
    place.verify()


def test_a_store_with_the_version_of_a_page_that_was_forgotten_changes_nothing(place: Place) -> None:
    place.store(7, halves(0, 1))
    old = place.tmem.version(7)
    place.tmem.invalidate(7, 1)
    assert place.tmem.store_if(7, old, encode(page_of("half", 2), LZ4_CODEC)) is False
    assert place.tmem.load(7) == ZERO_PAGE


def test_the_same_place_in_a_later_use_of_the_segment_is_another_version(place: Place) -> None:
    place.store(7, halves(0, 1))
    old = place.tmem.version(7)
    place.write_back()
    place.tmem.invalidate(7, 1)
    place.store(7, halves(0, 1))
    assert place.tmem.version(7)[0] == old[0]
    assert place.tmem.version(7) != old
    assert place.tmem.store_if(7, old, encode(page_of("half", 2), LZ4_CODEC)) is False


def test_a_write_back_leaves_the_version(place: Place) -> None:
    place.store(7, halves(0, 1))
    version = place.tmem.version(7)
    place.write_back()
    assert place.tmem.version(7) == version
    assert place.tmem.store_if(7, version, encode(page_of("half", 2), LZ4_CODEC)) is True
    assert place.tmem.load(7) == page_of("half", 2)


def test_an_empty_slot_has_a_version_too(tmem: Tmem) -> None:
    version = tmem.version(7)
    assert tmem.store_if(7, version, encode(page_of("half", 2), LZ4_CODEC)) is True
    assert tmem.store_if(7, version, encode(page_of("half", 3), LZ4_CODEC)) is False


def test_a_store_if_unchanged_that_finds_no_free_frame_is_told_from_one_that_came_too_late(place: Place) -> None:
    place.tmem.limit_pool(0)
    assert place.tmem.store_if(7, place.tmem.version(7), encode(page_of("half", 2), LZ4_CODEC)) is None
    assert place.tmem.load(7) == ZERO_PAGE


# ---- what leaves first ---------------------------------------------------------------------------------------------


def test_raw_pages_have_segments_of_their_own(place: Place) -> None:
    place.store(0, [page for number in range(20) for page in (page_of("raw", number), page_of("half", number))])
    lines = segment_lines(place.tmem)
    assert [(line.lane, line.state, line.pages) for line in lines] == [("raw", "open", 20), ("packed", "open", 20)]
    assert statistics(place.tmem).raw_pages == 20


def test_raw_pages_leave_before_older_packed_ones(place: Place) -> None:
    place.store(0, halves(0, 600))
    place.store(1000, raw(0, 2 * FULL))
    order = []
    while plan := place.tmem.plan_write_back(include_open=False):
        order.append((place.tmem.segments.lane(plan.segment), place.tmem.segments.sequence(plan.segment)))
        place.tmem.commit_write_back(plan)
    assert order == [(1, 3), (0, 1)]


def test_packed_pages_that_have_rested_are_written_ahead_while_raw_ones_are_young(place: Place) -> None:
    place.store(0, halves(0, 600))
    old = place.tmem.segments.next_sequence - 1
    place.store(1000, raw(0, 2 * FULL))
    plan = place.tmem.plan_write_ahead(old)
    assert plan is not None and place.tmem.segments.age(plan.segment) <= old
    place.tmem.abort_write_back(plan)
    assert place.tmem.plan_write_ahead(0) is None


def test_an_open_segment_leaves_only_when_asked_for_and_nothing_else_is_left(place: Place) -> None:
    place.store(0, halves(0, 600))
    assert [len(place.tmem.load(slot) or b"") for slot in (0, 599)] == [PAGE_BYTES, PAGE_BYTES]
    sealed = planned(place.tmem)
    assert place.tmem.segments.sequence(sealed.segment) == 1
    assert place.tmem.plan_write_back(include_open=False) is None
    assert place.tmem.segments.sequence(planned(place.tmem).segment) == 2


def test_an_empty_store_has_no_victim(tmem: Tmem) -> None:
    assert tmem.plan_write_back(include_open=True) is None
    assert (tmem.has_victims, tmem.reclaim.plan_release(), tmem.reclaim.plan_discard()) == (False, None, None)


def test_a_segment_is_written_in_whole_blocks(place: Place) -> None:
    place.store(0, halves(0, 3))
    plan = planned(place.tmem)
    fill = place.tmem.segments.fill(plan.segment)
    assert (len(plan.data), plan.pages, plan.extent) == (whole_blocks(fill), 3, 0)
    assert plan.data == place.tmem.arena.frame_view(plan.frame)[: whole_blocks(fill)]


def test_a_write_that_failed_is_next_again(place: Place) -> None:
    place.store(0, halves(0, 1100))
    plan = planned(place.tmem)
    place.tmem.abort_write_back(plan)
    assert place.tmem.segments.state(plan.segment) == SEALED
    again = planned(place.tmem)
    assert (again.segment, again.frame) == (plan.segment, plan.frame)
    assert again.extent != plan.extent
    place.tmem.abort_write_back(again)
    place.verify()


def test_a_full_backing_is_said_and_the_victim_waits(place: Place) -> None:
    place.store(0, halves(0, 600))
    place.tmem.limit_backing(SEGMENT_BYTES - 1)
    with pytest.raises(BackingFull, match=r"raise backing\.max or give it more space"):
        place.tmem.plan_write_back()
    assert place.tmem.has_victims
    place.tmem.limit_backing(SEGMENT_BYTES)
    place.write_back()
    place.verify()


def test_the_jobs_are_told_when_a_segment_is_opened_and_when_one_is_written_or_emptied() -> None:
    told = list[int]()
    tmem = new_tmem(notice=lambda frame_freed: told.append(len(told)))
    tmem.store(0, packed(halves(0, 2)))
    assert len(told) == 1
    tmem.commit_write_back(planned(tmem))
    assert len(told) == 2
    tmem.invalidate(0, 1)
    assert len(told) == 3  # less than half of it is live
    tmem.invalidate(1, 1)
    assert len(told) == 4


def test_the_jobs_are_told_that_the_pool_is_full() -> None:
    told = list[int]()
    tmem = new_tmem(notice=lambda frame_freed: told.append(len(told)))
    tmem.limit_pool(0)
    assert told == []
    tmem.store(0, packed(raw(0, 1)))
    assert told == [0]


# ---- loads ---------------------------------------------------------------------------------------------------------


def test_a_slot_never_stored_reads_as_zeros(tmem: Tmem) -> None:
    assert tmem.load(1234) == ZERO_PAGE
    assert tmem.plan_read(0, 3).pages == [ZERO_PAGE] * 3


def test_the_load_of_a_page_on_the_tier_gives_nothing(place: Place) -> None:
    place.store(0, halves(0, 5))
    assert place.tmem.load(3) == page_of("half", 3)
    place.write_back()
    assert place.tmem.load(3) is None
    place.store(3, halves(9, 1))
    assert place.tmem.load(3) == page_of("half", 9)
    place.verify()


def test_a_page_is_in_ram_until_its_write_is_committed(place: Place) -> None:
    place.store(0, raw(0, 5))
    plan = planned(place.tmem)
    assert place.tmem.segments.state(plan.segment) == WRITING
    assert place.tmem.load(3) == page_of("raw", 3)
    place.tmem.commit_write_back(plan)
    assert place.tmem.load(3) is None


def test_a_read_takes_pages_from_ram_and_says_where_the_others_are(place: Place) -> None:
    place.store(10, raw(0, 4))
    place.write_back()
    place.store(11, raw(7, 1))
    place.tmem.invalidate(12, 1)
    plan = place.tmem.plan_read(9, 6)
    assert [page and page[:8] for page in plan.pages] == [
        bytes(8),
        None,
        page_of("raw", 7)[:8],
        bytes(8),
        None,
        bytes(8),
    ]
    assert [(record.at, record.slot) for record in plan.records] == [(1, 10), (4, 13)]
    assert [record.length for record in plan.records] == [PAGE_BYTES, PAGE_BYTES]
    assert place.tmem.segments.pins == {plan.records[0].segment: 2}
    place.tmem.commit_read(plan.records)
    assert place.tmem.segments.pins == {}


def test_a_segment_being_read_outlives_its_last_page(place: Place) -> None:
    place.store(0, raw(0, 2))
    extent = place.write_back().extent
    plan = place.tmem.plan_read(0, 2)
    segment = plan.records[0].segment
    place.tmem.invalidate(0, 2)
    assert (place.tmem.segments.state(segment), place.tmem.reclaim.plan_discard()) == (ON_TIER, None)
    assert place.reader.perform(plan) == raw(0, 2)
    assert place.tmem.segments.state(segment) == FREE
    discard = place.tmem.reclaim.plan_discard()
    assert discard is not None and discard.extents == (extent,)


def test_a_read_that_ends_at_a_page_damaged_in_ram_pins_nothing(place: Place) -> None:
    place.store(0, raw(0, 1))
    place.write_back()
    place.store(1, halves(0, 1))
    payload = payload_of(place.tmem, 1)
    payload[:] = b"\xff" * len(payload)
    with pytest.raises(Corrupt, match="the record of slot 1 is damaged in RAM: test the machine's memory"):
        place.tmem.plan_read(1, 2)
    assert place.tmem.segments.pins == {}
    assert place.reader.perform(place.tmem.plan_read(0, 2)) == raw(0, 1)
    assert place.tmem.segments.pins == {}


def test_a_read_from_the_tier_that_fails_leaves_the_page_there(place: Place) -> None:
    place.store(0, raw(0, 1))
    place.write_back()
    place.tier.fail("read")
    with pytest.raises(TierError):
        place.load(0)
    place.tier.fail()
    place.verify()


def payload_of(tmem: Tmem, slot: int) -> memoryview:
    handle = tmem.slots.handles[slot]
    at = tmem.segments.base[handle_segment(handle)] + handle_offset(handle) + RECORD_HEADER_BYTES
    return tmem.arena.view[at : at + handle_length(handle)]


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_record_found_damaged_in_ram_is_counted(place: Place, codec: str) -> None:
    place.tmem.store(0, [encode(page_of("half", 1), parse_codec(codec))])
    payload = payload_of(place.tmem, 0)
    payload[3:] = b"\xff" * (len(payload) - 3)
    for _ in range(2):  # the kernel asks again, which is no more damage
        with pytest.raises(Corrupt):
            place.tmem.load(0)
    assert place.tmem.counts.damaged_in_ram == 1


def test_a_record_damaged_in_ram_never_loads_as_less_than_a_page(place: Place) -> None:
    place.store(0, halves(0, 1))
    payload = payload_of(place.tmem, 0)
    lengths = set()
    for at in range(len(payload) - 16, len(payload)):
        for bit in range(8):
            payload[at] ^= 1 << bit
            try:
                lengths.add(len(place.tmem.load(0) or b""))
            except Corrupt:
                lengths.add(PAGE_BYTES)
            payload[at] ^= 1 << bit
    assert lengths == {PAGE_BYTES}


# ---- what becomes empty --------------------------------------------------------------------------------------------


def test_a_sealed_segment_is_freed_with_its_last_page(place: Place) -> None:
    place.store(0, raw(0, FULL + 1))
    [sealed, opened] = place.tmem.segments.in_use()
    place.tmem.invalidate(0, FULL - 1)
    assert place.tmem.segments.state(sealed) == SEALED
    place.tmem.invalidate(FULL - 1, 1)
    assert place.tmem.segments.in_use() == [opened]
    assert place.tmem.pages_stored == 1


def test_an_open_segment_without_a_page_is_filled_further(place: Place) -> None:
    place.store(0, raw(0, 1))
    place.tmem.invalidate(0, 1)
    [segment] = place.tmem.segments.in_use()
    place.store(0, raw(1, 1))
    assert place.tmem.segments.in_use() == [segment]
    assert place.tmem.segments.state(segment) == OPEN
    place.verify()


def test_a_segment_that_becomes_empty_while_it_is_written_is_freed_by_the_commit(place: Place) -> None:
    place.store(0, raw(0, 2))
    plan = planned(place.tmem)
    place.tmem.invalidate(0, 2)
    assert place.tmem.segments.state(plan.segment) == WRITING
    place.tmem.commit_write_back(plan)
    assert place.tmem.segments.state(plan.segment) == FREE
    assert (statistics(place.tmem).segments_on_disk, place.tmem.extents.retired_bytes) == (0, len(plan.data))
    check(place.tmem)


def test_a_segment_that_becomes_empty_while_its_write_fails_is_freed_by_the_abort(place: Place) -> None:
    place.store(0, raw(0, 2))
    plan = planned(place.tmem)
    place.tmem.invalidate(0, 2)
    place.tmem.abort_write_back(plan)
    assert place.tmem.segments.state(plan.segment) == FREE
    assert not place.tmem.has_victims
    check(place.tmem)


def test_an_extent_is_not_used_again_while_its_hole_is_punched(place: Place) -> None:
    place.store(0, raw(0, 1))
    first = place.write_back().extent
    place.tmem.invalidate(0, 1)
    place.store(0, raw(0, 1))
    second = place.write_back().extent
    assert (first, second) == (0, 1)
    discard = place.tmem.reclaim.plan_discard()
    assert discard is not None
    place.store(1, raw(1, 1))
    assert place.write_back().extent == 2
    place.tmem.reclaim.abort_discard(discard)
    place.tmem.reclaim.punch_again()
    discard = place.tmem.reclaim.plan_discard()
    assert discard is not None and discard.extents == (first,)
    place.tmem.reclaim.commit_discard(discard)
    place.store(1, raw(1, 1))
    assert place.write_back().extent == first


def test_memory_is_released_in_parts(place: Place) -> None:
    place.store(0, raw(0, 7 * FULL))
    place.tmem.invalidate(0, 6 * FULL)
    held = place.tmem.pool_bytes
    first, second = place.tmem.reclaim.plan_release(1), place.tmem.reclaim.plan_release()
    assert first is not None and second is not None
    assert (len(first.frames), len(second.frames)) == (1, 1)  # of six frames the reserve keeps four
    place.tmem.reclaim.commit_release(first)
    place.tmem.reclaim.abort_release(second)
    assert place.tmem.pool_bytes == held - SEGMENT_BYTES
    again = place.tmem.reclaim.plan_release()
    assert again is not None and again.frames == second.frames


def test_the_reserve_is_populated_up_to_its_size(tmem: Tmem) -> None:
    plans = [tmem.reclaim.plan_populate() for _ in range(5)]
    assert [plan is not None for plan in plans] == [True] * 4 + [False]
    for plan in plans[:4]:
        assert plan is not None
        tmem.reclaim.commit_populate(plan, ok=plan is not plans[0])
    assert tmem.pool_bytes == 3 * SEGMENT_BYTES
    assert tmem.reclaim.plan_populate() is not None


# ---- figures -------------------------------------------------------------------------------------------------------


def test_statistics_are_of_the_pages_that_are_live(place: Place) -> None:
    place.store(0, [page_of(kind, 3) for kind in ("zero", "fill", "raw", "half", "text")])
    place.tmem.plan_read(0, 5)
    place.tmem.invalidate(1, 1)
    place.tmem.invalidate(1, 1)
    found = statistics(place.tmem)
    assert (found.pages_stored, found.zero_pages, found.fill_pages, found.raw_pages) == (4, 1, 0, 1)
    assert (found.stores, found.loads_ram, found.invalidates) == (5, 4, 1)
    live = [encode(page_of(kind, 3), LZ4_CODEC)[1] for kind in ("raw", "half", "text")]
    assert found.compressed_bytes == sum(map(len, live))
    place.write_back()
    found = statistics(place.tmem)
    assert (found.pages_in_ram, found.pages_on_disk, found.segments_on_disk) == (2, 1, 1)


def count(tmem: Tmem, counter: int, value: int) -> None:
    """Have the ledger say something else."""
    tmem.ledger.counters[ONLY_POOL][counter] = value


@pytest.mark.parametrize(
    ("name", "tamper"),
    [
        ("live bytes of segment 0", lambda tmem: tmem.ledger.live.__setitem__(0, 1)),
        ("pages of segment 0", lambda tmem: tmem.ledger.pages.__setitem__(0, 1)),
        ("base of segment 0", lambda tmem: tmem.segments.base.__setitem__(0, -1)),
        ("pages by tag of pool 0", lambda tmem: count(tmem, LZ4, 0)),
        ("compressed bytes of pool 0", lambda tmem: count(tmem, COMPRESSED_BYTES, 0)),
        ("live bytes of pool 0", lambda tmem: count(tmem, LIVE_BYTES, 0)),
        ("tier pages of pool 0", lambda tmem: count(tmem, TIER_PAGES, 1)),
        ("tier live bytes of pool 0", lambda tmem: count(tmem, TIER_LIVE_BYTES, 1)),
        ("cold pages of pool 0", lambda tmem: count(tmem, COLD_PAGES, 1)),
        ("cold raw pages of pool 0", lambda tmem: count(tmem, COLD_RAW_PAGES, 1)),
        ("frames in use", lambda tmem: tmem.arena.used.clear()),
        ("bytes held on the tier", lambda tmem: setattr(tmem.extents, "held_bytes", 1)),
        ("record of slot 2", lambda tmem: tmem.arena.view.__setitem__(8, 9)),
    ],
)
def test_a_check_names_the_figure_that_differs(place: Place, name: str, tamper: Callable[[Tmem], None]) -> None:
    place.store(2, halves(0, 2))
    check(place.tmem)
    tamper(place.tmem)
    with pytest.raises(AssertionError, match=name):
        check(place.tmem)


@pytest.mark.parametrize("segment", [0, 5], ids=["behind the fill", "in a free segment"])
def test_a_scan_calls_a_handle_that_refers_to_no_record_a_bug(place: Place, segment: int) -> None:
    place.store(0, halves(0, 1))
    handle = place.tmem.slots.handles[0]
    place.tmem.slots.handles[9] = handle_of(LZ4, handle_length(handle), handle_offset(handle) | 1 << 16, segment)
    with pytest.raises(TmemfsError, match="bug in tmemfs: the handle of slot 9 refers to no record; please report it"):
        recount((place.tmem.slots,), place.tmem.segments)


def test_a_scan_calls_a_handle_outside_of_the_table_a_bug(place: Place) -> None:
    place.tmem.slots.handles[9] = handle_of(LZ4, 100, 0, 1 << 29)
    with pytest.raises(TmemfsError):
        recount((place.tmem.slots,), place.tmem.segments)


def test_a_segment_that_becomes_empty_while_it_is_read_is_no_victim(place: Place) -> None:
    place.store(0, raw(0, 2))
    place.write_back()
    reading = place.tmem.plan_read(0, 1)
    place.tmem.invalidate(0, 2)
    check(place.tmem)
    assert not list(place.tmem.ledger.occupancy.candidates(TIER)) and place.tmem.segments.in_use()
    place.tmem.commit_read(reading.records)
    assert not place.tmem.segments.in_use()


# ---- a kill at any point -------------------------------------------------------------------------------------------


def kill(patch: pytest.MonkeyPatch, owner: object, name: str, after: bool = False, call: int = 1) -> None:
    """The process ends at the `call`-th call of `name`: before it does anything, or `after` it is done."""
    real, calls = getattr(owner, name), iter(range(1, 1 << 30))

    def ends(*arguments: Any, **more: Any) -> Any:
        if next(calls) != call:
            return real(*arguments, **more)
        if after:
            real(*arguments, **more)
        raise Killed

    patch.setattr(owner, name, ends)


def furnish(place: Place) -> None:
    """Pages of every kind in RAM, in segments open and sealed, and on the tier."""
    place.store(0, raw(0, FULL))
    place.write_back()
    place.store(300, halves(0, 520))
    place.store(900, raw(1000, FULL))
    place.store(1200, [page_of("zero", 0), page_of("fill", 1), page_of("text", 2)])
    place.store(0, raw(5000, 3))  # three of the first ones are dead


def in_python(place: Place) -> None:
    """Store with Appender in Python, whose steps can be told apart; test_compiled.py kills the other one."""
    place.tmem._appender = Appender(place.tmem.slots, place.tmem.transitions)


def go_on(place: Place) -> None:
    """After a kill: every page is there, and storing, writing back and loading continue."""
    place.start()
    place.verify()
    place.store(1500, halves(7000, 300) + raw(7000, 100))
    while True:
        while sparse := place.tmem.plan_merge_before_write(include_open=True):
            merge(place.tmem, sparse, place.tier)
        plan = place.tmem.plan_write_back(include_open=True)
        if plan is None:
            break
        place.tier.write(plan.extent, plan.data, plan.sequence)
        place.tmem.commit_write_back(plan)
    place.verify()


Point = Callable[[pytest.MonkeyPatch, Tmem], None]
STORE_POINTS: dict[str, Point] = {
    "before the record": lambda patch, _: kill(patch, record_module, "xxh3_64_intdigest"),
    "behind the header": lambda patch, _: kill(patch, record_module, "_pack_header", after=True),
    "before the fill": lambda patch, tmem: kill(patch, tmem.segments, "set_fill"),
    "behind the fill": lambda patch, tmem: kill(patch, tmem.segments, "set_fill", after=True),
}
OPEN_POINTS: dict[str, Point] = {
    "before the old one is sealed": lambda patch, tmem: kill(patch, tmem.segments, "move"),
    "when the old one is sealed": lambda patch, tmem: kill(patch, tmem.segments, "move", after=True),
    "before fill and sequence": lambda patch, tmem: kill(patch, tmem.segments, "open"),
    "before the place": lambda patch, tmem: kill(patch, tmem.segments, "move", call=2),
    "when it is open and empty": lambda patch, tmem: kill(patch, tmem.segments, "open", after=True),
}
COMMIT_POINTS: dict[str, Point] = {
    "before the place": lambda patch, tmem: kill(patch, tmem.segments, "move"),
    "behind the place": lambda patch, tmem: kill(patch, tmem.segments, "move", after=True),
    "before the frame is given back": lambda patch, tmem: kill(patch, tmem.arena, "give_back"),
    "when the frame is given back": lambda patch, tmem: kill(patch, tmem.arena, "give_back", after=True),
}


@pytest.mark.parametrize("slot", [400, 1000, 0, 20, 1200, 1300], ids=["open", "raw", "rewritten", "on the tier", "zero", "empty"])
@pytest.mark.parametrize("point", STORE_POINTS)
def test_a_store_killed_before_its_handle_leaves_the_old_page(
    place: Place, monkeypatch: pytest.MonkeyPatch, point: str, slot: int
) -> None:
    furnish(place)
    in_python(place)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        STORE_POINTS[point](patch, place.tmem)
        place.tmem.store(slot, packed(halves(9000, 1)))
    go_on(place)


def test_a_store_killed_behind_its_handle_leaves_the_new_page(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(place)
    in_python(place)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, place.tmem.ledger, "drop")
        place.tmem.store(400, packed(halves(9000, 1)))
    place.pages[400] = page_of("half", 9000)
    go_on(place)


def test_a_store_of_many_pages_killed_within_leaves_those_before(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(place)
    in_python(place)
    pages = halves(9000, 10)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, place.tmem.segments, "set_fill", call=5)
        place.tmem.store(1400, packed(pages))
    place.pages |= {1400 + number: page for number, page in enumerate(pages[:4])}
    go_on(place)


@pytest.mark.parametrize("point", OPEN_POINTS)
def test_a_store_killed_while_it_opens_a_segment_loses_nothing(place: Place, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    furnish(place)
    place.store(900, raw(2000, FULL - 3))  # the raw lane's open segment is full now
    with monkeypatch.context() as patch, pytest.raises(Killed):
        OPEN_POINTS[point](patch, place.tmem)
        place.tmem.store(900, packed(raw(9000, 1)))
    go_on(place)


@pytest.mark.parametrize("written", [0.0, 0.5, 1.0])
def test_a_write_back_killed_while_it_writes_leaves_the_pages_in_ram(place: Place, written: float) -> None:
    furnish(place)
    plan = planned(place.tmem)
    place.tier.write(plan.extent, plan.data[: int(len(plan.data) * written)], plan.sequence)
    on_disk = place.tmem.ledger.totals().tier_pages
    place.start()
    assert place.tmem.ledger.totals().tier_pages == on_disk
    go_on(place)


@pytest.mark.parametrize("point", COMMIT_POINTS)
def test_a_write_back_killed_while_it_is_committed_loses_nothing(place: Place, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    furnish(place)
    plan = planned(place.tmem)
    place.tier.write(plan.extent, plan.data, plan.sequence)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        COMMIT_POINTS[point](patch, place.tmem)
        place.tmem.commit_write_back(plan)
    go_on(place)


def test_a_write_back_killed_while_it_fails_loses_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(place)
    plan = planned(place.tmem)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, place.tmem.segments, "move")
        place.tmem.abort_write_back(plan)
    go_on(place)


@pytest.mark.parametrize("call", [1, 2, 100])
def test_an_invalidate_killed_within_forgets_the_first_pages_only(place: Place, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    furnish(place)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, place.tmem.ledger, "drop", call=call)
        place.tmem.invalidate(900, FULL)
    for slot in range(900, 900 + call):
        del place.pages[slot]
    go_on(place)


@pytest.mark.parametrize("name", ["move", "retire"])
def test_a_death_on_the_tier_killed_within_frees_the_segment_at_the_next_start(
    place: Place, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    furnish(place)
    owner = place.tmem.segments if name == "move" else place.tmem.extents
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, owner, name)
        place.tmem.invalidate(0, FULL)
    for slot in range(FULL):
        place.pages.pop(slot, None)
    place.start()
    assert ON_TIER not in [place.tmem.segments.state(segment) for segment in place.tmem.segments.in_use()]
    go_on(place)


def test_plans_of_a_store_that_was_killed_are_forgotten(place: Place) -> None:
    furnish(place)
    place.tmem.plan_read(10, 8)
    place.tmem.reclaim.plan_populate()
    place.tmem.reclaim.plan_release()
    planned(place.tmem)
    place.start()
    assert place.tmem.segments.pins == {}
    assert place.tmem.extents.retired_bytes == 0
    assert place.tmem.arena.idle == 0
    go_on(place)


def test_a_start_after_a_start_is_the_same(place: Place) -> None:
    furnish(place)
    place.start()
    before = statistics(place.tmem), segment_lines(place.tmem), bytes(place.regions.segments.view)
    place.start()
    assert (statistics(place.tmem), segment_lines(place.tmem), bytes(place.regions.segments.view)) == before
    place.verify()


def test_a_segment_that_is_being_filled_is_not_called_sparse(place: Place) -> None:
    place.store(0, raw(0, 1))
    assert statistics(place.tmem).ram_amplification == 1.0
    place.store(1, raw(1, FULL))
    assert 1.0 < statistics(place.tmem).ram_amplification < 1.01
    for slot in range(0, FULL, 2):
        place.tmem.invalidate(slot, 1)
    assert statistics(place.tmem).ram_amplification > 1.9


def test_statistics_look_at_no_segment(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes longer the more segments there are would hold up loads."""
    furnish(place)
    expected = statistics(place.tmem)
    monkeypatch.setattr(place.tmem.segments, "words", None)
    assert statistics(place.tmem) == expected


class CountedLock:
    """A lock, and how often it was taken."""

    def __init__(self) -> None:
        self.inner = threading.Lock()
        self.times = 0

    def __enter__(self) -> None:
        self.inner.acquire()
        self.times += 1

    def __exit__(self, *_: object) -> None:
        self.inner.release()


def test_segments_are_listed_a_few_at_a_time_so_that_loads_come_between(monkeypatch: pytest.MonkeyPatch) -> None:
    tmem, lock = new_tmem(slots=33 * FULL, frames=40, limit=40), CountedLock()
    tmem.store(0, [(RAW, page_of("raw", 1))] * (33 * FULL))
    monkeypatch.setattr(tmem, "lock", lock)
    assert len(segment_lines(tmem)) == 33
    assert lock.times == -(-33 // 8)


def pages_by_lane(tmem: Tmem) -> tuple[int, ...]:
    """What a scan of the slots finds."""
    pages = [0] * len(LANES)
    for slot in tmem.slots.occupied(0, SLOTS):
        if (handle := tmem.slots.handles[slot]) != ZERO_HANDLE:
            pages[tmem.segments.lane(handle_segment(handle))] += 1
    return tuple(pages)


def test_pages_by_lane_are_those_of_a_scan_after_cleaning_and_dropping(place: Place) -> None:
    furnish(place)
    tmem = place.tmem
    assert lane_pages(tmem.ledger.totals()) == pages_by_lane(tmem) and sum(pages_by_lane(tmem)) > 0
    tmem.invalidate(0, SLOTS)
    assert lane_pages(tmem.ledger.totals()) == pages_by_lane(tmem) == (0, 0, 0)
