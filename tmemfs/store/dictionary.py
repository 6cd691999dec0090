"""Dictionaries: what pages of one machine have in common, trained on some of them, so that zstd need not say it in each page.

A segment whose records were encoded with a dictionary begins with that dictionary, as a record of its own (tag DICTIONARY, slot
DICTIONARY_SLOT) that no handle refers to. So it goes wherever the segment goes, and whoever finds the segment, after a crash too,
finds what decodes it. Those in use are also kept here, by number. Knows nothing of slots and lanes.

Thread-safety: `Dictionary.decode` from any thread, `Encoder.encode` from one at a time; `Dictionaries` under the store's lock, but
for `known`.

Invariant: 1. A number means the same dictionary as long as a segment bears it.
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

#: Every segment pays for its own: 4 KiB saved 0.312 of lz4's bytes and cost 0.004 of the segment; 32 KiB 0.330 and 0.031.
DICTIONARY_BYTES: Final = 4096
DICTIONARY_SLOT: Final = 0xFFFF_FFFF
#: What it takes of a segment, at most.
DICTIONARY_RECORD_BYTES: Final = record_bytes(DICTIONARY_BYTES)
#: Memory for training, as a power of 2: with zstd's own choice, 20, it takes 12 MB more, and the result is no better.
_TRAINING_LOG: Final = 16
#: Fewer pages than this teach nothing that is true of others.
LEAST_SAMPLES: Final = 64


class Dictionary:
    """`data`, which may be any bytes, as a dictionary of zstd; `number` is what segments call it."""

    def __init__(self, number: int, data: bytes) -> None:
        self.number = number
        self.data = data
        self.for_zstd = zstandard.ZstdCompressionDict(data)
        self._of_thread = threading.local()

    def decode(self, payload: bytes | memoryview) -> bytes:
        """The page that was encoded as `payload`. Raises Corrupt."""
        try:
            decompressor = self._of_thread.decompressor
        except AttributeError:
            decompressor = zstandard.ZstdDecompressor(dict_data=self.for_zstd, format=ZSTD_FORMAT)
            self._of_thread.decompressor = decompressor
        try:
            page: bytes = decompressor.decompress(payload, max_output_size=PAGE_BYTES)
        except (zstandard.ZstdError, ValueError, MemoryError) as error:
            raise Corrupt(f"a record does not decode with its dictionary ({error}): restart the page's owner") from error
        if len(page) != PAGE_BYTES:
            raise Corrupt(f"a record decodes to {len(page)} bytes, not a page: restart the page's owner")
        return page

    def write_to(self, segment: memoryview, seed: int) -> int:
        """Write its record at the start of `segment`, whose sequence gives `seed`; the bytes that takes."""
        return write_record(segment, 0, DICTIONARY, DICTIONARY_SLOT, self.data, seed)


class Encoder:
    """Encodes pages with `dictionary` at a `level` of zstd."""

    def __init__(self, dictionary: Dictionary, level: int) -> None:
        self.dictionary = dictionary
        self.level = level
        self._compressor = zstandard.ZstdCompressor(dict_data=dictionary.for_zstd, compression_params=zstd_parameters(level))

    def encode(self, page: bytes) -> bytes:
        """The payload of one page."""
        return self._compressor.compress(page)


class Dictionaries:
    """Those that segments bear, as far as they have been met."""

    def __init__(self) -> None:
        self._known: dict[int, Dictionary] = {}
        self._last = 0

    def __len__(self) -> int:
        return len(self._known)

    def known(self, number: int) -> Dictionary | None:
        """Dictionary `number`, if it has been met; else it is at the start of the segments that bear it."""
        return self._known.get(number)

    def add(self, data: bytes) -> Dictionary:
        """A new one."""
        return self.adopt(self._last + 1, data)

    def adopt(self, number: int, data: bytes) -> Dictionary:
        """The one that was found in a segment that bears `number`."""
        self._last = max(self._last, number)
        return self._known.setdefault(number, Dictionary(number, data))

    def number_above(self, number: int) -> None:
        """Give no number that a segment bears already."""
        self._last = max(self._last, number)

    def keep_only(self, numbers: Collection[int]) -> None:
        """Forget all but `numbers`; one that is met again is adopted again."""
        self._known = {number: found for number, found in self._known.items() if number in numbers}


def read_dictionary(segment: memoryview, seed: int) -> bytes:
    """The dictionary at the start of `segment` (its first DICTIONARY_RECORD_BYTES will do), verified. Raises Corrupt."""
    # No handle knows the length, so the record itself has to say it. A false one does not verify.
    length = next((length for _, _, _, length in scan(segment, RECORD_HEADER_BYTES)), 0)
    try:
        return bytes(read_record(segment, 0, DICTIONARY_SLOT, DICTIONARY, length, seed))
    except Corrupt:
        raise Corrupt(
            "the dictionary of a segment is damaged: check the backing device, then restart what used its pages"
        ) from None


def train(pages: Sequence[bytes]) -> bytes | None:
    """A dictionary of DICTIONARY_BYTES or less for pages like `pages`; None where they have too little in common."""
    if len(pages) < LEAST_SAMPLES:
        return None
    try:
        return zstandard.train_dictionary(DICTIONARY_BYTES, list(pages), f=_TRAINING_LOG).as_bytes()
    except zstandard.ZstdError:
        return None
