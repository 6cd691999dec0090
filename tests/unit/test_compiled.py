"""The compiled store beside the one in Python: the same bytes and counts, and a kill at any instant loses nothing."""

from __future__ import annotations

import os
import signal
import time
from array import array
from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parts import KINDS, Regions, page_of
from tmemfs.errors import TmemfsError
from tmemfs.store import codec, recovery
from tmemfs.store import native as hot
from tmemfs.store.append import Appender
from tmemfs.store.codec import FILL, LARGEST_COMPRESSED_BYTES, LZ4, RAW, ZERO_PAGE, Packed, decode, encode, parse_codec
from tmemfs.store.consistency import check
from tmemfs.store.record import GRAIN_BYTES, ZERO_HANDLE, SegmentId, handle_length, handle_of, handle_segment, handle_tag
from tmemfs.store.segments import FREE, LANE_COLD, LANE_PACKED, LANE_RAW, MERGING, SEALED, SegmentTable
from tmemfs.store.slots import SlotTable
from tmemfs.store.statistics import statistics
from tmemfs.store.tmem import Tmem
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES

pytestmark = pytest.mark.compiled

SLOTS: Final = 2000
FRAMES: Final = 6
#: What the child that is killed stores: slots, a batch of them at a time, and how many pages each slot is given in turns.
STORED: Final = 400
BATCH: Final = 40
VERSIONS: Final = 6
#: lz4 as it is compiled in and as its Python package has it are two builds, which may choose other matches.
BUILDS_DIFFER_BYTES: Final = 24
LZ4_CODEC = parse_codec("lz4")


def encode_lz4(pages: bytes | bytearray) -> list[Packed]:
    return hot.encode_pages(memoryview(pages), LZ4_CODEC)


#: Where lz4's payload is about as large as it may be, a page is raw or not by a byte.
NEARLY_RAW: Final = range(LARGEST_COMPRESSED_BYTES - BUILDS_DIFFER_BYTES, PAGE_BYTES)


def some_page(kind: str, seed: int) -> bytes:
    """A page of any kind, or one that hardly compresses."""
    if kind == "nearly raw":
        noise = Random(seed).randbytes(NEARLY_RAW[seed % len(NEARLY_RAW)])
        return noise.ljust(PAGE_BYTES, b"\0")
    return page_of(kind, seed)  # type: ignore[arg-type]


PAGES = st.builds(some_page, st.sampled_from((*KINDS, "nearly raw")), st.integers(0, 1 << 16))
#: "part": raw payloads of any length, which alone leave gaps before a block.
RUN = st.tuples(
    st.integers(0, SLOTS - 1), st.integers(1, 300), st.sampled_from((*KINDS, "part")), st.integers(0, 1 << 16), st.integers(0, 3)
)


def encoded(kind: str, seed: int) -> Packed:
    """What a store may be given."""
    if kind == "part":
        return RAW, Random(seed).randbytes(seed % PAGE_BYTES + 1)
    return encode(page_of(kind, seed), LZ4_CODEC)  # type: ignore[arg-type]


@given(st.lists(PAGES, max_size=20))
def test_pages_are_encoded_as_in_python(pages: list[bytes]) -> None:
    found = encode_lz4(b"".join(pages))
    assert [decode(tag, payload) for tag, payload in found] == pages
    for (tag, payload), page in zip(found, pages, strict=True):
        theirs = encode(page, LZ4_CODEC)
        if {tag, theirs[0]} == {LZ4, RAW}:  # two builds of lz4: one just fits
            assert LARGEST_COMPRESSED_BYTES - min(len(payload), len(theirs[1])) < BUILDS_DIFFER_BYTES
        elif tag == LZ4:
            assert theirs[0] == LZ4 and abs(len(payload) - len(theirs[1])) < BUILDS_DIFFER_BYTES
        else:
            assert (tag, payload) == theirs


def test_what_is_encoded_shares_nothing_with_the_request() -> None:
    request = bytearray(page_of("half", 1) + page_of("raw", 2) + page_of("fill", 3))
    packed = encode_lz4(request)
    expected = [bytes(request[at : at + PAGE_BYTES]) for at in range(0, len(request), PAGE_BYTES)]
    request[:] = bytes(len(request))
    assert [decode(tag, payload) for tag, payload in packed] == expected


def test_other_codecs_are_encoded_in_python() -> None:
    pages = b"".join(page_of(kind, 1) for kind in KINDS)
    for name in ("zstd:1", "none"):
        assert hot.encode_pages(memoryview(pages), parse_codec(name)) == codec.encode_pages(memoryview(pages), parse_codec(name))


@settings(max_examples=60)
@given(st.lists(RUN, min_size=1, max_size=25), st.integers(2, FRAMES))
def test_the_regions_and_counts_are_those_of_python(runs: list[tuple[int, int, str, int, int]], limit: int) -> None:
    """Runs of pages over each other, with free frames and without, invalidated and written back in between."""
    ours, theirs = _Store(limit), _Store(limit)
    theirs.tmem._appender = Appender(theirs.tmem.slots, theirs.tmem.transitions)
    try:
        for first, count, kind, seed, then in runs:
            packed = [encoded(kind, seed + n) for n in range(min(count, SLOTS - first))]
            packed[::7] = [encoded("zero", 0)] * len(packed[::7])
            assert ours.store(first, packed, then) == theirs.store(first, packed, then)
            assert ours.state() == theirs.state()
        check(ours.tmem)
    finally:
        ours.regions.close()
        theirs.regions.close()


class _Store:
    """A store in memory that was used before, and all that can be seen of it."""

    def __init__(self, limit: int) -> None:
        self.regions = Regions.new(SLOTS, FRAMES, 32)
        self.regions.arena.view[:] = b"\xa5" * len(self.regions.arena.view)
        self.tmem: Tmem = self.regions.start(limit, SLOTS)

    def store(self, first: int, packed: Sequence[Packed], then: int) -> list[int]:
        """Store from the first and again from the middle; then forget some, or write a segment back."""
        stored = [self.tmem.store(first, [*packed]), self.tmem.store(first, [*packed], len(packed) // 2)]
        if then == 1:
            self.tmem.invalidate(first // 2, 200)
        if then == 2:
            if merge := self.tmem.plan_merge_before_write(include_open=True):
                self.tmem.merges.abort(merge)
            elif plan := self.tmem.plan_write_back(include_open=True):
                self.tmem.commit_write_back(plan)
        return stored

    def state(self) -> tuple[object, ...]:
        """Regions, derived tables and counters."""
        tmem = self.tmem
        regions = (bytes(region.view) for region in (self.regions.slots, self.regions.segments, self.regions.arena))
        ledger = tmem.ledger
        tables = (ledger.live, ledger.pages, tmem.segments.base, ledger.occupancy.floor)
        lanes = [(lane.is_open, lane.segment, lane.base, lane.fill, lane.seed, [*lane.sealed]) for lane in tmem.lanes]
        return (*regions, *map(bytes, tables), lanes, statistics(tmem), tmem.counts, ledger.counters)


#: A segment as a crash may leave it: its state, its lane, what of it is filled.
SEGMENT = st.tuples(st.integers(FREE, MERGING), st.sampled_from((LANE_PACKED, LANE_RAW, LANE_COLD)), st.integers(0, SEGMENT_BYTES))
#: A slot and a handle into one of the segments, whether or not a record is there.
HANDLE = st.tuples(
    st.integers(0, SLOTS - 1),
    st.builds(
        handle_of,
        st.sampled_from((RAW, LZ4, FILL)),
        st.integers(1, PAGE_BYTES),
        st.integers(0, SEGMENT_BYTES // GRAIN_BYTES - 1).map(lambda grain: grain * GRAIN_BYTES),
        st.integers(0, 6),
    )
    | st.sampled_from((ZERO_HANDLE, (1 << 64) - 1)),
)


@settings(max_examples=200)
@given(st.lists(SEGMENT, min_size=4, max_size=6), st.lists(HANDLE, max_size=60), st.booleans())
def test_a_scan_finds_what_the_one_in_python_finds(
    records: list[tuple[int, int, int]], handles: list[tuple[int, int]], is_whole: bool
) -> None:
    slots, segments = SlotTable(SLOTS), SegmentTable(len(records))
    for segment, (state, lane, fill) in enumerate(records):
        # Nearly every random table has a handle that refers to nothing. So there are some in which all refer to something.
        segments.words[segment * 4] = (state or SEALED if is_whole else state) | lane << 8
        segments.set_fill(SegmentId(segment), SEGMENT_BYTES if is_whole else fill, segment)
    for slot, handle in handles:
        slots.handles[slot] = _into_table(handle, len(records)) if is_whole else handle
    found = list[recovery.Recount | str]()
    for count in (recovery.count_pool, hot.count_pool):
        try:
            found.append(recovery.recount((slots,), segments, count))
        except TmemfsError as error:
            found.append(str(error))
    assert found[0] == found[1]
    assert not is_whole or isinstance(found[0], recovery.Recount)
    for region in (slots.region, segments.region):
        region.close()


def _into_table(handle: int, segments: int) -> int:
    """`handle`, at the start of a segment that is there."""
    if handle == ZERO_HANDLE:
        return handle
    return handle_of(handle_tag(handle), min(handle_length(handle), PAGE_BYTES), 0, handle_segment(handle) % segments)


def test_a_scan_of_tables_that_are_too_short_is_refused() -> None:
    compiled = pytest.importorskip("tmemfs.store.compiled")
    slots, segments, counts = SlotTable(SLOTS), SegmentTable(8), array("i", [0]) * 8
    for live, count in ((counts[:7], 8), (counts, 9)):
        with pytest.raises(IndexError, match="there are not"):
            compiled.count_pool(slots.handles, segments.words[: 8 * 4], count, live, counts)


def test_what_is_no_page_is_refused_and_nothing_is_lost() -> None:
    store = _Store(FRAMES)
    pages = [encode(page_of("half", n), LZ4_CODEC) for n in range(3)]
    for bad in (None, (LZ4, bytearray(5)), (LZ4,), ("x", b""), (8, b""), (LZ4, None), (LZ4, bytes(5000))):
        with pytest.raises((TypeError, IndexError, ValueError)):
            store.tmem.store(10, [*pages, bad])  # type: ignore[list-item]
        check(store.tmem)
        assert [store.tmem.load(10 + n) for n in range(3)] == [page_of("half", n) for n in range(3)]
    with pytest.raises(IndexError, match="no entry -1"):
        store.tmem.store(10, pages, -1)
    with pytest.raises(IndexError):
        store.tmem.store((1 << 64) - 1, pages)
    with pytest.raises(IndexError, match="no slot 2000"):
        store.tmem.store(SLOTS - 2, pages)
    check(store.tmem)
    store.regions.close()


def test_a_store_that_is_killed_at_any_instant_loses_nothing() -> None:
    """A child stores pages over each other until it is killed; what it left is a store, and each page one that was stored."""
    regions, random = Regions.new(SLOTS, FRAMES, 8), Random(1)
    batches = [
        (first, memoryview(b"".join(_version_of(first + at, version) for at in range(BATCH))))
        for version in range(1, VERSIONS + 1)
        for first in range(0, STORED, BATCH)
    ]
    seen = list[set[int]]()
    while len(seen) < 12 or not _was_caught_at_it(seen):
        assert len(seen) < 500, "every kill came between two versions"
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            _store_for_ever(regions, batches, writer)
        os.close(writer)
        assert os.read(reader, 1)  # every slot has been stored once
        time.sleep(random.random() * 0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        tmem = regions.start(FRAMES, SLOTS)
        check(tmem)
        pages = [tmem.load(slot) or b"" for slot in range(SLOTS)]
        versions = [int.from_bytes(page[4:8], "little") for page in pages]
        assert pages[:STORED] == [_version_of(slot, version) for slot, version in enumerate(versions[:STORED])]
        assert pages[STORED:] == [ZERO_PAGE] * (SLOTS - STORED)
        seen.append({*versions[:STORED]})


def _was_caught_at_it(seen: list[set[int]]) -> bool:
    """Whether a child was killed in the middle of a version, and not always of the same one."""
    return max(map(len, seen)) > 1 and len(set.union(*seen)) > 1


@cache
def _version_of(slot: int, version: int) -> bytes:
    """What a slot is given as its `version`, which compresses to some extent or not at all."""
    stamp = slot.to_bytes(4, "little") + version.to_bytes(4, "little")
    noise = Random(slot * 31 + version).randbytes(PAGE_BYTES // (1 + version % 3))
    return (stamp + noise).ljust(PAGE_BYTES, b"\0")[:PAGE_BYTES]


def _store_for_ever(regions: Regions, batches: list[tuple[int, memoryview]], told: int) -> None:
    """In the child: store all, tell, and repeat; never returns."""
    try:
        tmem = regions.start(FRAMES, SLOTS)
        while True:
            for first, pages in batches:
                assert tmem.store(first, hot.encode_pages(pages, LZ4_CODEC)) == BATCH
            os.write(told, b".")
    finally:
        os._exit(1)
