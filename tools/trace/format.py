"""The format of a trace file: the requests to a pager.

The whole file is one zstd frame; in it, numbers little-endian:

    offset  size  field
    0       8     magic, "tmtrace1"
    8       8     n, the number of requests
    16      8     p, the number of pages stored by all of them
    24      n     operation of each request: 0 store, 1 load, 2 discard
    24+n    8n    microseconds since the request before; of the first, since the start
    24+9n   8n    first slot, less the slot behind the request before (modulo 2^64)
    24+17n  8n    pages
    24+25n  2p    payload bytes of each page stored, in order; 0 for a zero page, which has no record

A column of numbers wider than a byte is stored in planes, the lowest byte of all numbers first. That puts bytes that change little
next to each other: 5 MB in memory become 100 KB in the file. The columns are the form in memory too (`Columns`); reading makes
`Request`s of them. Knows nothing of who records, and only the lengths of payloads.

Invariants:
1. Reading returns the columns that were written.
2. Times never decrease. There are as many payload lengths as pages in all stores.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from struct import Struct
from typing import Final

import zstandard

from tmemfs.errors import BadValue

STORE: Final = 0
LOAD: Final = 1
DISCARD: Final = 2
_HEAD: Final = Struct("<8sQQ")
_MAGIC: Final = b"tmtrace1"
_WIDE: Final = 8
_LEVEL: Final = 19
_MODULO: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Request:
    """`operation` (STORE, LOAD, DISCARD) on slots [first, first + count), `at_us` after the start.

    `payloads` has the bytes of each page's payload for a store, and is empty otherwise.
    """

    at_us: int
    operation: int
    first: int
    count: int
    payloads: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Columns:
    """Requests in order, a column per field; `payloads` holds those of all stores, one after the other."""

    operations: array[int] = field(default_factory=lambda: array("B"))
    times_us: array[int] = field(default_factory=lambda: array("Q"))
    firsts: array[int] = field(default_factory=lambda: array("Q"))
    counts: array[int] = field(default_factory=lambda: array("Q"))
    payloads: array[int] = field(default_factory=lambda: array("H"))

    def __len__(self) -> int:
        return len(self.operations)

    def __iter__(self) -> Iterator[Request]:
        at = 0
        for operation, at_us, first, count in zip(self.operations, self.times_us, self.firsts, self.counts, strict=True):
            stored = count if operation == STORE else 0
            yield Request(at_us, operation, first, count, tuple(self.payloads[at : at + stored]))
            at += stored

    def append(self, at_us: int, operation: int, first: int, count: int, payloads: Sequence[int] = ()) -> None:
        """Append a request; `payloads` has `count` entries for a store."""
        self.operations.append(operation)
        self.times_us.append(at_us)
        self.firsts.append(first)
        self.counts.append(count)
        self.payloads.extend(payloads)


def write(file: Path, columns: Columns) -> None:
    """Write `columns` to `file`, which is replaced. Raises OSError."""
    times = _steps(columns.times_us, [0, *columns.times_us])
    firsts = _steps(columns.firsts, [0, *map(int.__add__, columns.firsts, columns.counts)])
    planes = map(_planes, (times, firsts, columns.counts, columns.payloads))
    head = _HEAD.pack(_MAGIC, len(columns), len(columns.payloads))
    file.write_bytes(zstandard.ZstdCompressor(level=_LEVEL).compress(b"".join((head, columns.operations.tobytes(), *planes))))


def read(file: Path) -> Columns:
    """The requests of a trace file. Raises BadValue for any other file, and OSError."""
    try:
        return _parse(zstandard.ZstdDecompressor().decompress(file.read_bytes()))
    except (zstandard.ZstdError, ValueError) as error:
        raise BadValue(f"{file} is not a trace ({error}): record one with 'python -m tools.trace record'") from error


def _parse(data: bytes) -> Columns:
    """The columns in `data`. Raises ValueError."""
    if len(data) < _HEAD.size or not data.startswith(_MAGIC):
        raise ValueError("it begins otherwise")
    _, count, pages = _HEAD.unpack_from(data)
    ends = list(accumulate((count, _WIDE * count, _WIDE * count, _WIDE * count, 2 * pages), initial=_HEAD.size))
    if ends[-1] != len(data):
        raise ValueError("its size is not what it says")
    kinds, parts = "BQQQH", [data[start:end] for start, end in pairwise(ends)]
    operations, times, steps, counts, payloads = map(_column, kinds, parts)
    columns = Columns(operations, array("Q", accumulate(times)), _firsts(steps, counts), counts, payloads)
    _check(columns)
    return columns


def _check(columns: Columns) -> None:
    """Raise ValueError if columns contradict each other."""
    if max(columns.operations, default=0) > DISCARD:
        raise ValueError("it has an unknown operation")
    stored = sum(count for operation, count in zip(columns.operations, columns.counts, strict=True) if operation == STORE)
    if stored != len(columns.payloads):
        raise ValueError("its stores and their payloads do not match")


def _steps(column: array[int], before: list[int]) -> array[int]:
    """The difference of each number to the one of `before` at the same place."""
    return array("Q", [(number - base) & _MODULO for number, base in zip(column, before, strict=False)])


def _firsts(steps: array[int], counts: array[int]) -> array[int]:
    """The first slots, from the steps between requests."""
    firsts, behind = array("Q"), 0
    for step, count in zip(steps, counts, strict=True):
        firsts.append((behind + step) & _MODULO)
        behind = firsts[-1] + count
    return firsts


def _planes(column: array[int]) -> bytes:
    """The lowest byte of every number, then the next one."""
    data = column.tobytes()
    return b"".join(data[plane :: column.itemsize] for plane in range(column.itemsize))


def _column(kind: str, planes: bytes) -> array[int]:
    """The numbers in planes."""
    column: array[int] = array(kind)
    data, width = bytearray(planes), column.itemsize
    count = len(planes) // width
    for plane in range(width):
        data[plane::width] = planes[plane * count : (plane + 1) * count]
    column.frombytes(data)
    return column
