"""Dictionaries: content that the pages of one machine have in common, so that zstd does not repeat it in each page.

A dictionary is trained on some of the pages. A segment whose records were encoded with one begins with that dictionary, as a
record of its own (tag DICTIONARY, slot DICTIONARY_SLOT) that no handle refers to. So the dictionary moves with the segment, and
after a crash it is found where the records are that need it. `Dictionaries` keeps copies of those in use, by number. Knows nothing
of slots and lanes.

Thread-safety: any thread may call `Dictionary.decode`, one thread at a time `Encoder.encode`. The store's lock guards
`Dictionaries`, except `known`.

Invariant: 1. A number means the same dictionary as long as a segment in use has that number.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from typing import Final

import zstandard

from tmemfs.errors import Corrupt
from tmemfs.store.codec import DICTIONARY, ZSTD_FORMAT, zstd_parameters
from tmemfs.store.record import RECORD_HEADER_BYTES, read_record, record_bytes, scan, write_record
from tmemfs.units import PAGE_BYTES

#: Each segment holds a copy. 4 KiB saved 0.312 of lz4's bytes and took 0.004 of the segment, 32 KiB saved 0.330 and took 0.031.
DICTIONARY_BYTES: Final = 4096
#: The largest swap has such a slot too. The tag tells their records apart.
DICTIONARY_SLOT: Final = 0xFFFF_FFFF
#: The most that a dictionary takes of its segment.
DICTIONARY_RECORD_BYTES: Final = record_bytes(DICTIONARY_BYTES)
#: Size of the tables for training, as a power of 2. zstd's default of 20 takes 12 MB more and gives no better result.
_TRAINING_LOG: Final = 16
#: A dictionary that is trained on fewer pages fits no others.
LEAST_SAMPLES: Final = 64


class Dictionary:
    """`data`, which may be any bytes, as a dictionary of zstd. `number` is its number in the segment table."""

    def __init__(self, number: int, data: bytes) -> None:
        self.number = number
        self.data = data
        self.for_zstd = zstandard.ZstdCompressionDict(data)
        # zstandard forbids that threads share a decompressor.
        self._of_thread = threading.local()

    def decode(self, payload: bytes | memoryview) -> bytes:
        """Return the page that was encoded as `payload`. Raises Corrupt."""
        # An exception costs the first call of a thread only. A check would cost each call, and loads wait for this one.
        try:
            decompressor = self._of_thread.decompressor
        except AttributeError:
            decompressor = zstandard.ZstdDecompressor(dict_data=self.for_zstd, format=ZSTD_FORMAT)
            self._of_thread.decompressor = decompressor
        try:
            page: bytes = decompressor.decompress(payload, max_output_size=PAGE_BYTES)
        # A damaged payload can claim any size: ValueError and MemoryError come from one that no memory holds.
        except (zstandard.ZstdError, ValueError, MemoryError) as error:
            raise Corrupt(f"a record does not decode with its dictionary ({error}): restart the page's owner") from error
        if len(page) != PAGE_BYTES:
            raise Corrupt(f"a record decodes to {len(page)} bytes, not a page: restart the page's owner")
        return page

    def write_to(self, segment: memoryview, seed: int) -> int:
        """Write the dictionary's record at the start of `segment`, whose seed is `seed`. Returns where the next one may start."""
        return write_record(segment, 0, DICTIONARY, DICTIONARY_SLOT, self.data, seed)


class Encoder:
    """Encodes pages with `dictionary` at `level` of zstd."""

    def __init__(self, dictionary: Dictionary, level: int) -> None:
        self.dictionary = dictionary
        self.level = level
        self._compressor = zstandard.ZstdCompressor(dict_data=dictionary.for_zstd, compression_params=zstd_parameters(level))

    def encode(self, page: bytes) -> bytes:
        """Return the payload of one page."""
        return self._compressor.compress(page)


class Dictionaries:
    """The dictionaries that segments begin with, by number: those that were made or read since the start."""

    def __init__(self) -> None:
        self._known: dict[int, Dictionary] = {}
        self._last = 0

    def __len__(self) -> int:
        return len(self._known)

    def known(self, number: int) -> Dictionary | None:
        """Return dictionary `number`, or None if it has to be read from the start of a segment first."""
        # Callers need not hold the lock: a look-up is one step of the interpreter, and `keep_only` replaces the dict whole.
        return self._known.get(number)

    def add(self, data: bytes) -> Dictionary:
        """Add `data` as a new dictionary."""
        return self.adopt(self._last + 1, data)

    def adopt(self, number: int, data: bytes) -> Dictionary:
        """Add the dictionary that was found in a segment with `number`. If two threads found it, both get the first one's."""
        self._last = max(self._last, number)
        return self._known.setdefault(number, Dictionary(number, data))

    def number_above(self, number: int) -> None:
        """Give only numbers above `number` from now on: segments have those up to it."""
        self._last = max(self._last, number)

    def keep_only(self, numbers: Collection[int]) -> None:
        """Forget all but `numbers`. A dictionary that is needed again is read and adopted again."""
        self._known = {number: found for number, found in self._known.items() if number in numbers}


def read_dictionary(segment: memoryview, seed: int) -> bytes:
    """Return the dictionary at the start of `segment`, verified. Its first DICTIONARY_RECORD_BYTES are enough. Raises Corrupt."""
    # No handle has the length, so it has to come from the record itself. A wrong one does not verify.
    length = next((length for _, _, _, length in scan(segment, RECORD_HEADER_BYTES)), 0)
    try:
        return bytes(read_record(segment, 0, DICTIONARY_SLOT, DICTIONARY, length, seed))
    except Corrupt:
        # That message names a slot, and DICTIONARY_SLOT would tell the reader nothing.
        raise Corrupt(
            "the dictionary of a segment is damaged: check the backing device, then restart what used its pages"
        ) from None


def train(pages: Sequence[bytes]) -> bytes | None:
    """Return a dictionary of at most DICTIONARY_BYTES for pages like `pages`; None if they have too little in common."""
    if len(pages) < LEAST_SAMPLES:
        return None
    try:
        return zstandard.train_dictionary(DICTIONARY_BYTES, list(pages), f=_TRAINING_LOG).as_bytes()
    except zstandard.ZstdError:
        # The trainer's way to say that it found nothing in common.
        return None
