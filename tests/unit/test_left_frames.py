"""A start over regions that a killed process left: no memory and no disk stays that nobody counts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from tests.parts import FaultyTier, Regions, page_of
from tmemfs.engine import Engine
from tmemfs.jobs.holes import Holes
from tmemfs.jobs.left_frames import adopt_left_frames
from tmemfs.store.codec import encode_pages, parse_codec
from tmemfs.store.region import Region
from tmemfs.store.tmem import Tmem
from tmemfs.system.memory import populate, punch
from tmemfs.system.residency import resident_parts
from tmemfs.tiers.file import FileTier
from tmemfs.tiers.in_memory import MemoryTier
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES

FRAMES: Final = 24
EXTENTS: Final = 12
SLOTS: Final = 4096
LIMIT: Final = 16
#: Raw pages of one segment.
FULL: Final = 255


@pytest.fixture
def regions() -> Iterator[Regions]:
    regions = Regions.new(SLOTS, FRAMES, EXTENTS)
    yield regions
    regions.close()


def store_full_segments(tmem: Tmem, count: int) -> None:
    """Store `count` segments of raw pages, each in a frame with memory behind all of it."""
    pages = memoryview(b"".join(page_of("raw", number) for number in range(FULL * count)))
    assert tmem.store(0, encode_pages(pages, parse_codec("none"))) == FULL * count
    for frame in tmem.arena.used:
        populate(tmem.arena.region.map, frame * SEGMENT_BYTES, SEGMENT_BYTES)


def fill_reserve(tmem: Tmem) -> None:
    """Fault the reserve in."""
    while plan := tmem.reclaim.plan_populate():
        populate(tmem.arena.region.map, plan.frame * SEGMENT_BYTES, SEGMENT_BYTES)
        tmem.reclaim.commit_populate(plan)


def release_all(tmem: Tmem) -> None:
    """One round of the release of memory."""
    while plan := tmem.reclaim.plan_release():
        for frame in plan.frames:
            punch(tmem.arena.region.fd, frame * SEGMENT_BYTES, SEGMENT_BYTES)
        tmem.reclaim.commit_release(plan)


def disk_bytes(path: Path) -> int:
    """What the file takes of its disk."""
    return os.stat(path).st_blocks * 512


def test_memory_that_a_killed_process_left_is_counted_and_released(regions: Regions) -> None:
    tmem = regions.start(LIMIT, SLOTS)
    store_full_segments(tmem, 9)
    fill_reserve(tmem)
    tmem.invalidate(FULL, 6 * FULL)  # six frames, of which none was released yet
    half = tmem.arena.take_cold()  # it was killed while it faulted this one in
    populate(regions.arena.map, half * SEGMENT_BYTES, SEGMENT_BYTES // 2)
    assert (len(tmem.arena.used), regions.arena.resident_bytes()) == (3, 13 * SEGMENT_BYTES + SEGMENT_BYTES // 2)

    tmem = regions.start(LIMIT, SLOTS)
    adopt_left_frames(tmem)
    assert (len(tmem.arena.used), tmem.arena.held, tmem.arena.wants_populating) == (3, 14, False)
    release_all(tmem)
    assert regions.arena.resident_bytes() == tmem.pool_bytes == 7 * SEGMENT_BYTES  # three in use, four ready


def test_an_engine_adopts_what_was_left(regions: Regions) -> None:
    store_full_segments(regions.start(LIMIT, SLOTS), 3)
    populate(regions.arena.map, 9 * SEGMENT_BYTES, SEGMENT_BYTES)
    engine = Engine.over(partial(regions.start, LIMIT, SLOTS), FaultyTier(), parse_codec("lz4"))
    assert (engine.tmem.arena.held, engine.tmem.arena.idle) == (4, 1)


def test_memory_that_cannot_be_asked_for_leaves_the_store_as_it_is(
    regions: Regions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> dict[int, int]:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("tmemfs.jobs.left_frames.resident_parts", refuse)
    populate(regions.arena.map, 0, SEGMENT_BYTES)
    tmem = regions.start(LIMIT, SLOTS)
    adopt_left_frames(tmem)
    assert tmem.arena.held == 0
    assert caplog.messages == ["memory that the last worker left could not be found: [Errno 22] Invalid argument"]


def test_disk_that_a_killed_process_left_is_given_back(regions: Regions, tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    tier = FileTier(backing)
    empty = disk_bytes(backing)
    tmem = regions.start(LIMIT, SLOTS)
    store_full_segments(tmem, 4)
    for _ in range(4):
        plan = tmem.plan_write_back(include_open=True)
        assert plan is not None
        tier.write(plan.extent, plan.data, plan.sequence)
        if plan.extent != 3:  # it was killed before it committed the last one
            tmem.commit_write_back(plan)
    tmem.invalidate(0, FULL)  # and before it punched this one
    used = disk_bytes(backing) - empty

    tmem = regions.start(LIMIT, SLOTS)
    assert sorted(tmem.extents.out) == [1, 2]
    holes = Holes(tmem, tier)
    assert holes.is_due
    holes.punch()
    assert (holes.counts.discarded, holes.is_due, tmem.extents.has_stale) == (2, False, False)
    # The file system needs a block more to say where the holes are.
    assert disk_bytes(backing) - empty < used - 2 * SEGMENT_BYTES + SEGMENT_BYTES // 8
    assert tmem.extents.held_bytes == 2 * SEGMENT_BYTES
    assert [tmem.extents.take(PAGE_BYTES) for _ in range(3)] == [0, 3, 4]
    tier.close()


def test_a_tier_that_cannot_discard_has_nothing_to_give_back(regions: Regions) -> None:
    tmem = regions.start(LIMIT, SLOTS)
    assert tmem.extents.take(PAGE_BYTES) == 0
    tmem, tier = regions.start(LIMIT, SLOTS), FaultyTier(MemoryTier(1 << 30), can_discard=False)
    holes = Holes(tmem, tier)
    assert not holes.is_due and tmem.extents.take(PAGE_BYTES) == 0


def test_parts_with_memory_are_found_and_no_others() -> None:
    region = Region("parts", 8 * SEGMENT_BYTES)
    populate(region.map, 0, SEGMENT_BYTES)
    populate(region.map, 2 * SEGMENT_BYTES + 8 * PAGE_BYTES, PAGE_BYTES)
    populate(region.map, 5 * SEGMENT_BYTES, 2 * SEGMENT_BYTES)
    found = {0: SEGMENT_BYTES, 2: PAGE_BYTES, 5: SEGMENT_BYTES, 6: SEGMENT_BYTES}
    for skip in (set[int](), {0}, {2}, {5, 6}, {1, 3}, set(range(8))):
        expected = {part: size for part, size in found.items() if part not in skip}
        assert resident_parts(region.fd, region.map, SEGMENT_BYTES, skip) == expected
    region.close()


def test_the_frame_of_a_segment_that_was_empty_is_given_to_one_segment_only(regions: Regions) -> None:
    tmem = regions.start(LIMIT, SLOTS)
    store_full_segments(tmem, 1)
    tmem.invalidate(0, FULL)  # of the segment that is open, so it is not freed before the kill
    assert tmem.arena.used

    tmem = regions.start(LIMIT, SLOTS)
    adopt_left_frames(tmem)
    taken = []
    while (frame := tmem.arena.take()) is not None:
        taken.append(frame)
    assert sorted(set(taken)) == sorted(taken)
