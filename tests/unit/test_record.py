"""The record: bit by bit as docs/format.md says, never over three blocks, found by a scan, refused where it does not belong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from tests.parts import KINDS, Kind, Regions, page_of
from tmemfs.errors import Corrupt
from tmemfs.store.codec import LARGEST_COMPRESSED_BYTES, TAG_NAMES, ZERO, encode, parse_codec
from tmemfs.store.record import (
    CHECKSUM_MASK,
    EMPTY,
    GRAIN_BYTES,
    LARGEST_RECORD_BYTES,
    LENGTH_MASK,
    LENGTH_SHIFT,
    OFFSET_MASK,
    OFFSET_SHIFT,
    RECORD_HEADER_BYTES,
    SEGMENT_SHIFT,
    TAG_MASK,
    ZERO_HANDLE,
    SegmentId,
    handle_accounts,
    handle_length,
    handle_of,
    handle_offset,
    handle_record_bytes,
    handle_segment,
    handle_tag,
    mark_gap,
    read_record,
    record_bytes,
    record_word,
    scan,
    segment_seed,
    start_of,
    whole_blocks,
    write_record,
)
from tmemfs.store.segments import RECORD_BYTES as SEGMENT_RECORD_BYTES
from tmemfs.store.slots import SLOT_BYTES
from tmemfs.units import BLOCK_BYTES, PAGE_BYTES, SEGMENT_BYTES

FORMAT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
TAGS = st.sampled_from(sorted(TAG_NAMES.keys() - {ZERO}))
OFFSETS = st.integers(0, SEGMENT_BYTES // GRAIN_BYTES - 1).map(lambda grain: grain * GRAIN_BYTES)
LENGTHS = st.integers(1, PAGE_BYTES) | st.sampled_from([8, LARGEST_COMPRESSED_BYTES, PAGE_BYTES])
#: (slot, tag, payload length)
Written = tuple[int, int, int]


def rows_of(heading: str, table: int = 0) -> list[list[str]]:
    """The cells of a table below `heading` in docs/format.md."""
    section = ("#" + FORMAT).split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[table].splitlines()[2:]]


def bits_of(heading: str, table: int) -> dict[str, tuple[int, int]]:
    """First and last bit of each field of a word."""
    ends = {row[-1].partition(" ")[0]: row[0].partition("-") for row in rows_of(heading, table)}
    return {name: (int(first), int(last)) for name, (first, _, last) in ends.items()}


def mask(bits: tuple[int, int]) -> int:
    return (1 << bits[1] + 1) - (1 << bits[0])


def blocks_touched(start: int, length: int) -> int:
    return (start + RECORD_HEADER_BYTES + length - 1) // BLOCK_BYTES - start // BLOCK_BYTES + 1


def record_of(slot: int, tag: int, payload: bytes, seed: int) -> bytes:
    """A record with its padding, the padding not zero."""
    record = bytearray(b"\xee" * record_bytes(len(payload)))
    assert write_record(memoryview(record), 0, tag, slot, payload, seed) == len(record)
    return bytes(record)


def write_all(written: list[Written]) -> tuple[memoryview, int, list[int]]:
    """A segment with `written` in it, its fill, and where each record starts; nothing in it was zero before."""
    segment = memoryview(bytearray(b"\xff" * (len(written) * (LARGEST_RECORD_BYTES + BLOCK_BYTES))))
    fill, starts = 0, []
    for slot, tag, length in written:
        start = start_of(fill, length)
        if start != fill:
            mark_gap(segment, fill)
        starts.append(start)
        fill = write_record(segment, start, tag, slot, bytes(length), 0)
    return segment, fill, starts


def test_the_record_is_laid_out_as_documented() -> None:
    fields = {row[3].partition(":")[0]: row[:2] for row in rows_of("Record")}
    assert fields["word"] == ["0", "8"]
    assert fields["swap slot"] == ["8", "4"]
    assert fields["payload"] == [str(RECORD_HEADER_BYTES), "n"]
    segment = bytearray(b"\xee" * 24)
    assert write_record(memoryview(segment), 4, 3, 0x0A0B0C0D, b"pay", 9) == 20
    word = record_word(3, 0x0A0B0C0D, b"pay", 9)
    assert bytes(segment) == b"\xee" * 4 + word.to_bytes(8, "little") + bytes([0x0D, 0x0C, 0x0B, 0x0A]) + b"pay" + b"\xee" * 5


def test_the_word_has_the_documented_bits() -> None:
    bits = bits_of("Record", 1)
    assert mask(bits["tag"]) == TAG_MASK
    assert mask(bits["payload"]) == LENGTH_MASK << LENGTH_SHIFT
    assert mask(bits["checksum"]) == CHECKSUM_MASK


def test_the_handle_has_the_documented_bits() -> None:
    bits = bits_of("Handle", 0)
    assert mask(bits["tag"]) == TAG_MASK
    assert mask(bits["payload"]) == LENGTH_MASK << LENGTH_SHIFT
    assert mask(bits["offset"]) == OFFSET_MASK << OFFSET_SHIFT
    assert bits["segment"] == (SEGMENT_SHIFT, 63)
    assert [row[:2] for row in rows_of("Handle", 1)][:2] == [
        [str(EMPTY), "empty: the slot reads as zeros"],
        [str(ZERO_HANDLE), "zero page"],
    ]


def test_the_tags_are_the_documented_ones() -> None:
    assert {int(row[0]): row[1] for row in rows_of("Record", 2)} == TAG_NAMES


def test_the_constants_are_the_documented_ones() -> None:
    documented = {row[0]: int(row[1].partition(" ")[0].replace(",", "")) for row in rows_of("Format")}
    assert documented == {
        "page": PAGE_BYTES,
        "block": BLOCK_BYTES,
        "segment, frame, extent": SEGMENT_BYTES,
        "grain": GRAIN_BYTES,
        "header of a record": RECORD_HEADER_BYTES,
        "one entry of the slot table": SLOT_BYTES,
        "one entry of the segment table": SEGMENT_RECORD_BYTES,
    }


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zero"])
@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_what_a_store_writes_is_the_documented_record(kind: Kind, codec: str) -> None:
    regions = Regions.new(slots=64, frames=3, extents=1)
    tmem = regions.start(limit=3, slots=64)
    tag, payload = packed = encode(page_of(kind, 9), parse_codec(codec))
    tmem.store(40, [encode(page_of(kind, 8), parse_codec(codec))])
    tmem.store(41, [packed])
    handle = tmem.slots.handles[41]
    segment = handle_segment(handle)
    seed = 41 | tag << 32 | (tmem.segments.sequence(segment) & (1 << 29) - 1) << 35
    word = tag | len(payload) << 3 | xxh3_64_intdigest(payload, seed) >> 16 << 16
    at = tmem.segments.base[segment] + handle_offset(handle)
    assert bytes(tmem.arena.view[at : at + 12 + len(payload)]) == word.to_bytes(8, "little") + (41).to_bytes(4, "little") + payload
    assert (handle & 7, handle >> 3 & 0x1FFF) == (tag, len(payload))
    assert handle_offset(handle) == tmem.segments.fill(segment) - record_bytes(len(payload))
    assert word == record_word(tag, 41, payload, segment_seed(tmem.segments.sequence(segment)))
    regions.close()


@given(tag=st.integers(0, 7), length=st.integers(0, LENGTH_MASK), offset=OFFSETS, segment=st.integers(0, (1 << 30) - 1))
def test_a_handle_gives_its_fields_back(tag: int, length: int, offset: int, segment: int) -> None:
    handle = handle_of(tag, length, offset, segment)
    assert handle == tag | length << LENGTH_SHIFT | offset // GRAIN_BYTES << OFFSET_SHIFT | segment << SEGMENT_SHIFT < 1 << 64
    assert handle_tag(handle) == tag
    assert handle_record_bytes(handle) == record_bytes(length)
    assert handle_accounts(handle) == (segment, tag, length, record_bytes(length))
    assert (handle_length(handle), handle_offset(handle), handle_segment(handle)) == (length, offset, SegmentId(segment))


@given(st.integers(0, 1 << 64))
def test_the_seed_has_the_lower_29_bits_of_the_sequence(sequence: int) -> None:
    assert segment_seed(sequence) == sequence % (1 << 29) << 35


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 12), (1, 16), (4, 16), (5, 20), (8, 20), (3900, 3912), (4095, 4108), (4096, 4108)]
)
def test_a_record_takes_whole_grains(length: int, expected: int) -> None:
    assert record_bytes(length) == expected


@pytest.mark.parametrize(("fill", "expected"), [(0, 0), (4, 4096), (4096, 4096), (4100, 8192), (SEGMENT_BYTES, SEGMENT_BYTES)])
def test_a_segment_takes_whole_blocks_of_a_tier(fill: int, expected: int) -> None:
    assert whole_blocks(fill) == expected


@given(OFFSETS, LENGTHS)
@example(4084, PAGE_BYTES)
@example(4088, PAGE_BYTES)
@example(4092, PAGE_BYTES)
@example(4092, LARGEST_COMPRESSED_BYTES)
def test_no_record_touches_three_blocks(offset: int, length: int) -> None:
    start = start_of(offset, length)
    assert blocks_touched(start, length) <= 2
    if blocks_touched(offset, length) <= 2:
        assert start == offset
    else:
        assert offset < start < offset + BLOCK_BYTES and start % BLOCK_BYTES == 0


def test_only_the_last_two_grains_of_a_block_are_too_late_for_a_raw_record() -> None:
    moved = [offset for offset in range(0, BLOCK_BYTES, GRAIN_BYTES) if start_of(offset, PAGE_BYTES) != offset]
    assert moved == [4088, 4092]


def test_a_packed_record_may_start_on_every_grain() -> None:
    assert all(start_of(offset, LARGEST_COMPRESSED_BYTES) == offset for offset in range(0, BLOCK_BYTES, GRAIN_BYTES))


def test_raw_records_leave_no_gap_and_fill_a_segment_with_255() -> None:
    fill = count = 0
    while fill + LARGEST_RECORD_BYTES <= SEGMENT_BYTES:
        assert start_of(fill, PAGE_BYTES) == fill
        fill, count = fill + LARGEST_RECORD_BYTES, count + 1
    assert (count, SEGMENT_BYTES - fill) == (255, 1036)


@given(st.lists(st.tuples(st.integers(0, (1 << 32) - 1), TAGS, LENGTHS), max_size=12))
@example([(1, 3, 4076), (2, 2, PAGE_BYTES), (3, 3, 8)])
@example([(1, 3, 4080), (2, 2, PAGE_BYTES), (2, 2, PAGE_BYTES)])
def test_a_scan_finds_exactly_what_was_written(written: list[Written]) -> None:
    segment, fill, starts = write_all(written)
    assert list(scan(segment, fill)) == [(start, *record) for start, record in zip(starts, written, strict=True)]


@pytest.mark.parametrize("length", [4076, 4080])
def test_a_scan_passes_over_the_gap_before_a_record_that_starts_on_a_block(length: int) -> None:
    segment, fill, starts = write_all([(7, 3, length), (8, 2, PAGE_BYTES), (9, 3, 8)])
    assert starts == [0, BLOCK_BYTES, BLOCK_BYTES + LARGEST_RECORD_BYTES]
    assert [slot for _, slot, _, _ in scan(segment, fill)] == [7, 8, 9]


def test_a_scan_ends_at_the_fill() -> None:
    segment, _, starts = write_all([(1, 4, 100), (2, 4, 200), (3, 4, 300)])
    assert [slot for _, slot, _, _ in scan(segment, starts[2])] == [1, 2]
    assert list(scan(segment, 0)) == []


SLOT, TAG, PAYLOAD, SEED = 0x01020304, 4, bytes(range(100)), segment_seed(77)


def test_a_record_verifies_where_it_belongs() -> None:
    record = bytearray(record_of(SLOT, TAG, PAYLOAD, SEED) + b"the record behind it")
    payload = read_record(memoryview(record), 0, SLOT, TAG, len(PAYLOAD), SEED)
    assert payload == PAYLOAD
    record[RECORD_HEADER_BYTES] = 0xAA
    assert payload[0] == 0xAA  # borrowed, not copied


@pytest.mark.parametrize(
    ("slot", "tag", "length", "seed"),
    [
        (SLOT + 1, TAG, len(PAYLOAD), SEED),
        (SLOT, TAG + 1, len(PAYLOAD), SEED),
        (SLOT, TAG, len(PAYLOAD) - 1, SEED),
        (SLOT, TAG, len(PAYLOAD) + 1, SEED),
        (SLOT, TAG, 0, SEED),
        (SLOT, TAG, len(PAYLOAD), segment_seed(78)),
        (SLOT, TAG, len(PAYLOAD), 0),
    ],
    ids=["slot", "tag", "shorter", "longer", "empty", "later segment", "no segment"],
)
def test_a_record_does_not_verify_elsewhere(slot: int, tag: int, length: int, seed: int) -> None:
    with pytest.raises(Corrupt, match=f"the record of slot {slot} is damaged: check the backing device"):
        read_record(memoryview(record_of(SLOT, TAG, PAYLOAD, SEED) + b"more"), 0, slot, tag, length, seed)


@pytest.mark.parametrize("bit", range(8))
def test_a_record_with_any_bit_flipped_does_not_verify(bit: int) -> None:
    for at in range(RECORD_HEADER_BYTES + len(PAYLOAD)):
        record = bytearray(record_of(SLOT, TAG, PAYLOAD, SEED))
        record[at] ^= 1 << bit
        with pytest.raises(Corrupt):
            read_record(memoryview(record), 0, SLOT, TAG, len(PAYLOAD), SEED)


@pytest.mark.parametrize("at", [0, 4, 4000, 4096])
def test_a_record_is_read_where_it_was_written(at: int) -> None:
    segment = memoryview(bytearray(2 * BLOCK_BYTES))
    write_record(segment, at, TAG, SLOT, PAYLOAD, SEED)
    assert read_record(segment, at, SLOT, TAG, len(PAYLOAD), SEED) == PAYLOAD


@pytest.mark.parametrize("cut", [1, len(PAYLOAD)])
def test_a_record_that_is_cut_off_does_not_verify(cut: int) -> None:
    with pytest.raises(Corrupt):
        read_record(memoryview(record_of(SLOT, TAG, PAYLOAD, SEED))[:-cut], 0, SLOT, TAG, len(PAYLOAD), SEED)


def test_padding_means_nothing() -> None:
    payload = b"12345"
    record = bytearray(record_of(SLOT, TAG, payload, SEED))
    assert len(record) == RECORD_HEADER_BYTES + len(payload) + 3
    record[-3:] = b"any"
    assert read_record(memoryview(record), 0, SLOT, TAG, len(payload), SEED) == payload


@given(page=st.binary(max_size=64), slot=st.integers(0, (1 << 32) - 1), tag=TAGS, sequence=st.integers(1, 1 << 29))
def test_the_word_alone_says_tag_and_length(page: bytes, slot: int, tag: int, sequence: int) -> None:
    word = record_word(tag, slot, page, segment_seed(sequence))
    assert (word & TAG_MASK, word >> LENGTH_SHIFT & LENGTH_MASK) == (tag, len(page))
    assert word.to_bytes(8, "little")[:GRAIN_BYTES] != bytes(GRAIN_BYTES)
