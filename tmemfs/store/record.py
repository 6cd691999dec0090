"""The record: one compressed page as it lies in a segment, in RAM and on a tier alike.

    offset  size  field
    0       8     word: bits 0-2 tag (codec.py), bits 3-15 payload length in bytes, bits 16-63 checksum
    8       4     swap slot
    12      n     payload
    12+n    0-3   padding to the next grain of 4 bytes

Records are packed tail to tail and straddle block boundaries; only a record that would touch three blocks starts at the next
boundary instead, so that no load reads more than two blocks. The gap before it is marked by a word of length 0.

The checksum is the upper 48 bits of xxh3-64 over the payload, seeded with the sequence number of the segment, the tag and the
slot. So a record verifies only where it belongs: a lost write that leaves an older segment's record in place is found too.

Handle of a slot (64 bits; 0 = empty, 1 = zero page):

    bits 0-2 tag, 3-15 payload length, 16-33 offset in grains, 34-63 segment

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

HEADER: Final = Struct("<QI")
HEADER_BYTES: Final = HEADER.size
GRAIN_BYTES: Final = 4
GRAIN_MASK: Final = GRAIN_BYTES - 1
LARGEST_RECORD_BYTES: Final = HEADER_BYTES + PAGE_BYTES

EMPTY: Final = 0
ZERO_HANDLE: Final = 1
TAG_MASK: Final = 0x7
LENGTH_SHIFT: Final = 3
LENGTH_MASK: Final = 0x1FFF
OFFSET_SHIFT: Final = 16
OFFSET_MASK: Final = 0x3FFFF
#: For offsets in bytes, whose lowest two bits are 0.
OFFSET_BYTES_SHIFT: Final = 14
OFFSET_BYTES_MASK: Final = OFFSET_MASK * GRAIN_BYTES
SEGMENT_SHIFT: Final = 34
CHECKSUM_MASK: Final = 0xFFFF_FFFF_FFFF_0000
_SEED_MASK: Final = 0xFFFF_FFFF_FFFF_FFFF


def handle_length(handle: int) -> int:
    """Payload bytes."""
    return handle >> LENGTH_SHIFT & LENGTH_MASK


def handle_offset(handle: int) -> int:
    """Offset of the record in its segment, in bytes."""
    return (handle >> OFFSET_SHIFT & OFFSET_MASK) * GRAIN_BYTES


def handle_segment(handle: int) -> SegmentId:
    """Index of the segment."""
    return SegmentId(handle >> SEGMENT_SHIFT)


def record_bytes(length: int) -> int:
    """Bytes a record with `length` bytes of payload occupies, padding included."""
    return (HEADER_BYTES + length + GRAIN_MASK) & ~GRAIN_MASK


def whole_blocks(fill: int) -> int:
    """`fill` bytes rounded up to blocks: what a segment takes on a tier."""
    return -(-fill // BLOCK_BYTES) * BLOCK_BYTES


def segment_seed(sequence: int) -> int:
    """What a segment's sequence number adds to the seed of its records' checksums."""
    return sequence << 35 & _SEED_MASK


def record_word(tag: int, slot: int, payload: bytes | memoryview, seed: int) -> int:
    """First word of the record: tag, length and checksum."""
    return xxh3_64_intdigest(payload, seed | tag << 32 | slot) & CHECKSUM_MASK | len(payload) << LENGTH_SHIFT | tag


def verify(record: memoryview, slot: int, tag: int, length: int, seed: int) -> memoryview:
    """The payload of `record` (borrowed), if header and checksum are what was written for this slot. Raises Corrupt."""
    word, owner = HEADER.unpack_from(record)
    payload = record[HEADER_BYTES : HEADER_BYTES + length]
    if owner != slot or word != record_word(tag, slot, payload, seed):
        raise Corrupt(f"the record of slot {slot} is damaged: check the backing device, then restart what used the page")
    return payload


def start_of(offset: int, length: int) -> int:
    """Where a record of `length` payload bytes may start at or after `offset`: never so that it touches three blocks."""
    if (offset % BLOCK_BYTES) + HEADER_BYTES + length > 2 * BLOCK_BYTES:
        return (offset + BLOCK_BYTES - 1) & -BLOCK_BYTES
    return offset


def mark_gap(segment: memoryview, at: int) -> None:
    """Say that no record starts between `at` and the next block."""
    segment[at : at + GRAIN_BYTES] = bytes(GRAIN_BYTES)


def scan(segment: memoryview, fill: int) -> Iterator[tuple[int, int, int, int]]:
    """(offset, slot, tag, length) of every record in the first `fill` bytes of a segment, dead ones included."""
    at = 0
    while at < fill:
        if int.from_bytes(segment[at : at + GRAIN_BYTES], "little") == 0:
            at = (at + BLOCK_BYTES) & -BLOCK_BYTES
            continue
        word, slot = HEADER.unpack_from(segment, at)
        length = word >> LENGTH_SHIFT & LENGTH_MASK
        yield at, slot, word & TAG_MASK, length
        at += record_bytes(length)
