"""The record, one compressed page as it lies in a segment, and the handle that refers to it.

A record is the same in RAM and on a tier:

    offset  size  field
    0       8     word: bits 0-2 tag (codec.py), bits 3-15 payload length in bytes, bits 16-63 checksum
    8       4     swap slot
    12      n     payload
    12+n    0-3   padding to the next grain of 4 bytes

Records are packed tail to tail and straddle block boundaries. Only a record that would touch three blocks starts at the next
boundary instead, so that no load reads more than two blocks. A grain of zeros marks the gap before it.

The checksum is the upper 48 bits of xxh3-64 over the payload, seeded with the sequence number of the segment, the tag and the
slot. So a record verifies only where it belongs: a lost write that leaves an older segment's record in place is found too.

Handle of a slot (64 bits; 0 = empty, 1 = zero page):

    bits 0-2 tag, 3-15 payload length, 16-33 offset in grains, 34-63 segment

This module has the encoder and the decoder of both. Three hot paths repeat parts of it:
`Tmem.load` and `Ledger.drop` take a handle apart, which saves 0.2 us of 4.2 per load and 0.07 of 0.8 per invalidate, and
compiled.pyx writes records and composes handles in C, which makes append 1.5 us per page and not 3.2 (docs/decisions/0015).

Knows nothing of where a segment lies. Source of the layout: docs/format.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final, NewType

from xxhash import xxh3_64_intdigest

from tmemfs.errors import Corrupt
from tmemfs.units import BLOCK_BYTES, PAGE_BYTES

Slot = NewType("Slot", int)
SegmentId = NewType("SegmentId", int)

_HEADER: Final = Struct("<QI")
RECORD_HEADER_BYTES: Final = _HEADER.size
GRAIN_BYTES: Final = 4
GRAIN_MASK: Final = GRAIN_BYTES - 1
LARGEST_RECORD_BYTES: Final = RECORD_HEADER_BYTES + PAGE_BYTES

EMPTY: Final = 0
ZERO_HANDLE: Final = 1
TAG_MASK: Final = 0x7
TAGS: Final = TAG_MASK + 1
LENGTH_SHIFT: Final = 3
LENGTH_MASK: Final = 0x1FFF
OFFSET_SHIFT: Final = 16
OFFSET_MASK: Final = 0x3FFFF
# An offset in bytes is a multiple of 4. So a shift by two bits less stores it in grains, without a division.
OFFSET_BYTES_SHIFT: Final = 14
OFFSET_BYTES_MASK: Final = OFFSET_MASK * GRAIN_BYTES
SEGMENT_SHIFT: Final = 34
#: Tag and length in a handle. Two handles that differ here refer to different encodings of a page.
ENCODING_MASK: Final = (1 << OFFSET_SHIFT) - 1
CHECKSUM_MASK: Final = 0xFFFF_FFFF_FFFF_0000
#: In the seed of a checksum: the slot has 32 bits, the tag 3, the sequence number the other 29.
SEED_TAG_SHIFT: Final = 32
_SEED_SEQUENCE_SHIFT: Final = 35
_SEED_MASK: Final = 0xFFFF_FFFF_FFFF_FFFF

_pack_header = _HEADER.pack_into


# ---- handles -------------------------------------------------------------------------------------------------------


def handle_of(tag: int, length: int, offset: int, segment: int) -> int:
    """The handle of a record with `length` bytes of payload, `offset` bytes into `segment`."""
    return tag | length << LENGTH_SHIFT | offset << OFFSET_BYTES_SHIFT | segment << SEGMENT_SHIFT


def handle_tag(handle: int) -> int:
    """How the payload is encoded (codec.py)."""
    return handle & TAG_MASK


def handle_length(handle: int) -> int:
    """Payload bytes."""
    return handle >> LENGTH_SHIFT & LENGTH_MASK


def handle_offset(handle: int) -> int:
    """Offset of the record in its segment, in bytes."""
    return handle >> OFFSET_BYTES_SHIFT & OFFSET_BYTES_MASK


def handle_segment(handle: int) -> SegmentId:
    """Index of the segment."""
    # A call of SegmentId would cost more than all the rest of this function.
    return handle >> SEGMENT_SHIFT  # type: ignore[return-value]


def handle_record_bytes(handle: int) -> int:
    """Bytes the record occupies, padding included."""
    return (RECORD_HEADER_BYTES + (handle >> LENGTH_SHIFT & LENGTH_MASK) + GRAIN_MASK) & ~GRAIN_MASK


def handle_accounts(handle: int) -> tuple[SegmentId, int, int, int]:
    """(segment, tag, payload bytes, record bytes): what counters keep of a handle.

    One call instead of four: 0.24 us and not 0.57, as fast as written out in the caller.
    """
    length = handle >> LENGTH_SHIFT & LENGTH_MASK
    size = (RECORD_HEADER_BYTES + length + GRAIN_MASK) & ~GRAIN_MASK
    return handle >> SEGMENT_SHIFT, handle & TAG_MASK, length, size  # type: ignore[return-value]


# ---- records: where they go ----------------------------------------------------------------------------------------


def record_bytes(length: int) -> int:
    """Bytes a record with `length` bytes of payload occupies, padding included."""
    return (RECORD_HEADER_BYTES + length + GRAIN_MASK) & ~GRAIN_MASK


def whole_blocks(fill: int) -> int:
    """`fill` bytes rounded up to blocks: what a segment takes on a tier."""
    return -(-fill // BLOCK_BYTES) * BLOCK_BYTES


def start_of(offset: int, length: int) -> int:
    """Where a record of `length` payload bytes may start at or after `offset`: never so that it touches three blocks."""
    if (offset % BLOCK_BYTES) + RECORD_HEADER_BYTES + length > 2 * BLOCK_BYTES:
        return (offset + BLOCK_BYTES - 1) & -BLOCK_BYTES
    return offset


# ---- records: encoder ----------------------------------------------------------------------------------------------


def segment_seed(sequence: int) -> int:
    """What a segment's sequence number adds to the seed of its records' checksums."""
    return sequence << _SEED_SEQUENCE_SHIFT & _SEED_MASK


def record_word(tag: int, slot: int, payload: bytes | memoryview, seed: int) -> int:
    """First word of the record: tag, length and checksum."""
    return xxh3_64_intdigest(payload, seed | tag << SEED_TAG_SHIFT | slot) & CHECKSUM_MASK | len(payload) << LENGTH_SHIFT | tag


def write_record(segment: memoryview, at: int, tag: int, slot: int, payload: bytes | memoryview, seed: int) -> int:
    """Write a record at offset `at`; gives where the next one may start. `seed` is the segment's."""
    _pack_header(segment, at, record_word(tag, slot, payload, seed), slot)
    start = at + RECORD_HEADER_BYTES
    end = start + len(payload)
    segment[start:end] = payload
    # The padding keeps what lay there before: nothing reads it, and the checksum does not cover it.
    return (end + GRAIN_MASK) & ~GRAIN_MASK


def mark_gap(segment: memoryview, at: int) -> None:
    """Say that no record starts between `at` and the next block."""
    segment[at : at + GRAIN_BYTES] = bytes(GRAIN_BYTES)


# ---- records: decoder ----------------------------------------------------------------------------------------------


def read_record(segment: memoryview, at: int, slot: int, tag: int, length: int, seed: int) -> memoryview:
    """The payload (borrowed) of the record at offset `at`, verified. `seed` is the segment's.

    Raises Corrupt unless header and checksum are what `write_record` wrote for this slot, tag and length; struct.error where
    `segment` ends within the header.
    """
    word, owner = _HEADER.unpack_from(segment, at)
    start = at + RECORD_HEADER_BYTES
    payload = segment[start : start + length]
    # The word covers the length too. So a payload that the end of `segment` cut off does not verify either.
    if owner != slot or word != record_word(tag, slot, payload, seed):
        raise Corrupt(f"the record of slot {slot} is damaged: check the backing device, then restart what used the page")
    return payload


def scan(segment: memoryview, fill: int) -> Iterator[tuple[int, int, int, int]]:
    """(offset, slot, tag, length) of every record in the first `fill` bytes of a segment, dead ones included.

    These are claims: only `read_record` verifies them. Raises struct.error where a damaged length leads past the end.
    """
    at = 0
    while at < fill:
        # No record starts with four zero bytes, since its tag is not 0: this is a gap.
        if int.from_bytes(segment[at : at + GRAIN_BYTES], "little") == 0:
            at = (at + BLOCK_BYTES) & -BLOCK_BYTES
            continue
        word, slot = _HEADER.unpack_from(segment, at)
        length = word >> LENGTH_SHIFT & LENGTH_MASK
        yield at, slot, word & TAG_MASK, length
        at += record_bytes(length)
