"""Traces: a file that comes back as it was written, a recorder that changes no answer, a replay whose victims are the store's."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Final, Literal

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.parts import KINDS, new_tmem, page_of
from tmemfs.engine import Engine
from tmemfs.errors import BadValue, NoSpace
from tmemfs.pages.pager import Deferred, Pager
from tmemfs.policy.victims import next_victim
from tmemfs.store.codec import encode, parse_codec
from tmemfs.store.tmem import Tmem
from tmemfs.tiers.in_memory import MemoryTier
from tmemfs.tiers.tier import Tier
from tmemfs.units import MIB, PAGE_BYTES, SEGMENT_BYTES
from tools.trace.format import DISCARD, LOAD, STORE, Columns, Request, read, write
from tools.trace.recorder import Recording, RecordingPager
from tools.trace.replay import Choice, Pool, footprint, oldest_first, replay
from tools.trace.summary import summary

LZ4: Final = parse_codec("lz4")
SLOTS: Final = 64
#: Payload bytes of a record of 4096 bytes; and how many of them one segment takes.
LARGE: Final = 4084
A_SEGMENT: Final = SEGMENT_BYTES // (LARGE + 12)

Ask = tuple[Literal["store", "load", "discard", "shrink"], int, int, int]
ASKS = st.lists(
    st.tuples(
        st.sampled_from(["store", "load", "discard", "shrink"]), st.integers(0, SLOTS - 1), st.integers(1, 8), st.integers(0, 9)
    ),
    max_size=40,
)


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    made, at_us = [], 0
    for operation in draw(st.lists(st.sampled_from([STORE, LOAD, DISCARD]), max_size=30)):
        at_us += draw(st.integers(0, 1 << 40))
        first = draw(st.integers(0, (1 << 32) - 1))
        payloads = tuple(draw(st.lists(st.integers(0, PAGE_BYTES), min_size=1, max_size=6))) if operation == STORE else ()
        made.append(Request(at_us, operation, first, len(payloads) or draw(st.integers(1, 1 << 32)), payloads))
    return made


def columns_of(made: list[Request]) -> Columns:
    columns = Columns()
    for request in made:
        columns.append(request.at_us, request.operation, request.first, request.count, request.payloads)
    return columns


def stores(first: int, count: int, payload: int = LARGE) -> Request:
    return Request(0, STORE, first, count, (payload,) * count)


# ---- the file -----------------------------------------------------------------------------------------------------------


@given(made=requests())
def test_a_trace_is_read_as_it_was_written(made: list[Request], tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("trace") / "one.trace"
    write(file, columns_of(made))
    assert list(read(file)) == made


def frame(*parts: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(b"".join(parts))


def number(value: int) -> bytes:
    return value.to_bytes(8, "little")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"a text\n",
        frame(b""),
        frame(b"tmtrace2", number(0), number(0)),
        frame(b"tmtrace1", number(0)),
        frame(b"tmtrace1", number(1), number(0)),
        frame(b"tmtrace1", number(0), number(0), b"more"),
        frame(b"tmtrace1", number(1 << 63), number(0)),
        frame(b"tmtrace1", number(1), number(0), bytes([3]), bytes(24)),
        frame(b"tmtrace1", number(1), number(0), bytes([STORE]), bytes(16), number(1)),
        frame(b"tmtrace1", number(0), number(0))[:-1],
    ],
)
def test_a_foreign_file_is_no_trace(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "foreign"
    file.write_bytes(data)
    with pytest.raises(BadValue, match=r"is not a trace .*: record one with"):
        read(file)


def test_the_columns_of_the_file_are_the_documented_ones(tmp_path: Path) -> None:
    write(tmp_path / "one", columns_of([Request(7, STORE, 0x0201, 2, (0x0403, 5)), Request(9, LOAD, 0x0203, 1)]))
    data = zstandard.ZstdDecompressor().decompress((tmp_path / "one").read_bytes())
    assert data[:26] == b"tmtrace1" + number(2) + number(2) + bytes([STORE, LOAD])
    assert data[26:42] == bytes([7, 2]) + bytes(14)
    assert data[42:58] == bytes([1, 0, 2, 0]) + bytes(12)
    assert data[58:74] == bytes([2, 1]) + bytes(14)
    assert data[74:] == bytes([3, 5, 4, 0])


# ---- the recorder -------------------------------------------------------------------------------------------------------


class Place:
    """An engine on a memory tier, asked as the relay asks."""

    def __init__(self, make_pager: Callable[..., Pager] = Pager) -> None:
        self.tier = MemoryTier(32 * MIB)
        engine = Engine.over(partial(new_tmem, slots=SLOTS), self.tier, LZ4, make_pager)
        self.tmem, self.pager = engine.tmem, engine.pager

    def close(self) -> None:
        """Give the descriptors back: a test of many examples would run out of them."""
        for region in (self.tmem.slots.region, self.tmem.segments.region, self.tmem.arena.region):
            region.close()

    def ask(self, what: Ask) -> bytes | None:
        operation, slot, count, seed = what
        count = min(count, SLOTS - slot)
        if operation == "store":
            pages = b"".join(page_of(KINDS[(seed + at) % len(KINDS)], seed) for at in range(count))
            return finished(self.pager.write(slot * PAGE_BYTES, memoryview(pages)))
        if operation == "discard":
            return finished(self.pager.discard(slot * PAGE_BYTES, count * PAGE_BYTES))
        if operation == "load":
            if count == 1:
                page = self.pager.load_page(slot)
                return page if page is not None else self.pager.read_page(slot)
            return finished(self.pager.read(slot * PAGE_BYTES, count * PAGE_BYTES))
        shrink(self.tmem, self.tier)
        return None


def finished(answer: bytes | Deferred | None) -> bytes | None:
    return answer.run() if isinstance(answer, Deferred) else answer


def shrink(tmem: Tmem, tier: Tier) -> None:
    """Write one segment back."""
    if merge := tmem.plan_merge_before_write(include_open=True):
        tmem.merges.abort(merge)
    elif plan := tmem.plan_write_back(include_open=True):
        tier.write(plan.extent, plan.data, plan.sequence)
        tmem.commit_write_back(plan)
    while release := tmem.reclaim.plan_release():
        tmem.reclaim.commit_release(release)


def asked(recording: Recording) -> list[tuple[int, int, int, tuple[int, ...]]]:
    """What was recorded, without the times."""
    return [(request.operation, request.first, request.count, request.payloads) for request in recording.columns]


def expected(what: Ask) -> tuple[int, int, int, tuple[int, ...]]:
    operation, slot, count, seed = what
    count = min(count, SLOTS - slot)
    if operation != "store":
        return (LOAD if operation == "load" else DISCARD), slot, count, ()
    pages = [page_of(KINDS[(seed + at) % len(KINDS)], seed) for at in range(count)]
    return STORE, slot, count, tuple(len(encode(page, LZ4)[1]) for page in pages)


@given(ASKS)
def test_what_is_asked_is_recorded_and_answered_as_by_any_pager(asks: list[Ask]) -> None:
    recording = Recording()
    plain, recorded = Place(), Place(partial(RecordingPager, recording=recording))
    for what in asks:
        assert recorded.ask(what) == plain.ask(what)
    assert recorded.tmem.counts == plain.tmem.counts
    assert recorded.tmem.ledger.counters == plain.tmem.ledger.counters
    assert asked(recording) == [expected(what) for what in asks if what[0] != "shrink"]
    assert list(recording.columns.times_us) == sorted(recording.columns.times_us)
    assert recording.left_out == 0
    plain.close()
    recorded.close()


def test_a_load_that_goes_to_the_tier_is_recorded_once() -> None:
    recording = Recording()
    place = Place(partial(RecordingPager, recording=recording))
    place.ask(("store", 3, 1, 2))
    place.ask(("shrink", 0, 1, 0))
    assert place.tmem.load(3) is None
    assert place.ask(("load", 3, 1, 0)) == page_of(KINDS[2], 2)
    assert asked(recording)[1:] == [(LOAD, 3, 1, ())]


def test_parts_of_pages_are_left_out_and_counted() -> None:
    recording = Recording()
    pager = Place(partial(RecordingPager, recording=recording)).pager
    assert pager.write(PAGE_BYTES - 1, memoryview(b"x" * (PAGE_BYTES + 2))) is None
    assert pager.discard(1, 2 * PAGE_BYTES) is None
    assert pager.read(0, 3 * PAGE_BYTES) == bytes(3 * PAGE_BYTES)
    assert asked(recording) == [(STORE, 1, 1, (8,)), (DISCARD, 1, 1, ()), (LOAD, 0, 3, ())]
    assert recording.left_out == 3


def test_what_is_past_the_end_is_not_recorded() -> None:
    recording = Recording()
    pager = Place(partial(RecordingPager, recording=recording)).pager
    end = SLOTS * PAGE_BYTES
    with pytest.raises(NoSpace):
        pager.write(end, memoryview(bytes(PAGE_BYTES)))
    assert pager.read(end, PAGE_BYTES) == b"" and pager.discard(end, PAGE_BYTES) is None
    assert len(recording.columns) == 0


def test_a_full_recording_takes_no_more() -> None:
    recording = Recording(most_requests=3, most_pages=4)
    for payloads in ([1, 2, 3], [4, 5], [6]):
        recording.note(STORE, 0, len(payloads), payloads)
    recording.note(LOAD, 0, 1)
    recording.note(LOAD, 1, 1)
    assert recording.columns.payloads == array("H", [1, 2, 3, 6])
    assert recording.columns.operations == array("B", [STORE, STORE, LOAD]) and recording.left_out == 2


# ---- sums and replays ---------------------------------------------------------------------------------------------------


def test_a_summary_counts_pages_and_tells_loads_from_reloads() -> None:
    made = [stores(0, 3, 100), Request(5, LOAD, 0, 2), Request(6, LOAD, 0, 1), Request(7, STORE, 0, 1, (0,)),
            Request(8, DISCARD, 2, 1), Request(2_000_000, LOAD, 0, 3)]  # fmt: skip
    sums = summary(made)
    assert (sums.requests, sums.seconds, sums.stores, sums.loads, sums.discards) == (6, 2.0, 4, 6, 1)
    assert (sums.slots_stored, sums.zero_pages, sums.stored_bytes) == (3, 1, 300)
    assert (sums.loaded_pages, sums.reloads) == (3, 2)
    assert sums.load_share == 0.6 and sums.reload_share == 0.4 and "reloads       2" in str(sums)


@pytest.mark.parametrize(("choose", "loads_disk"), [(oldest_first, 1), (next_victim, 0)])
def test_a_segment_that_is_loaded_from_has_a_second_chance(choose: Choice, loads_disk: int) -> None:
    made = [stores(0, 2 * A_SEGMENT + 1), Request(0, LOAD, 0, 1), stores(1000, A_SEGMENT), Request(0, LOAD, 0, 1)]
    assert replay(made, 3, choose).loads_disk == loads_disk


def test_raw_segments_leave_first_and_zero_pages_have_no_record() -> None:
    pool = Pool(3, oldest_first)
    for request in (stores(0, A_SEGMENT), stores(1000, 300, PAGE_BYTES), stores(2000, 10, 0), stores(3000, 1)):
        pool.play(request)
    assert pool.is_on_disk(1000) and not pool.is_on_disk(0) and not pool.is_on_disk(2000)
    pool.play(Request(0, LOAD, 2000, 1))
    assert (pool.outcome.loads_ram, pool.outcome.loads_disk, pool.outcome.written) == (0, 0, 1)


def test_what_dies_takes_no_room_and_is_not_written() -> None:
    made = [request for _ in range(20) for request in (stores(0, A_SEGMENT), Request(0, DISCARD, 0, A_SEGMENT))]
    assert replay(made, 2, oldest_first).written == 0
    assert replay([stores(0, A_SEGMENT) for _ in range(20)], 3, oldest_first).written == 0
    assert footprint(made) == 1 and footprint([stores(0, 3 * A_SEGMENT)]) == 3


def test_victims_of_a_replay_are_those_of_the_store() -> None:
    random, tier, tmem = Random(1), MemoryTier(64 * MIB), new_tmem(slots=16_384, frames=32, limit=6, extents=64)
    pool = Pool(6, next_victim)
    packed = [encode(page_of("half", seed), LZ4) for seed in range(8)]
    for slot in range(8000):
        page = [packed[slot % len(packed)]]
        while not tmem.store(slot, page):
            shrink(tmem, tier)
        pool.store(slot, len(page[0][1]))
        if random.random() < 0.004:
            loaded = max(slot - random.randrange(3000), 0)
            assert (tmem.load(loaded) is None) == pool.is_on_disk(loaded)
            pool.load(loaded)
    assert [tmem.load(slot) is None for slot in range(8000)] == [pool.is_on_disk(slot) for slot in range(8000)]
    assert pool.outcome.loads_disk > 0 and len(tier.extents) == pool.outcome.written > 8
