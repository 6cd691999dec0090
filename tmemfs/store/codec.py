"""Codecs: one page in, one payload out, and back.

Each payload has a *tag*, three bits of its handle and of its record, that says how to decode it. So the codec may change at any
time, and pages that are stored already stay readable. Zero pages and pages of one repeated 8-byte word are found before any
compressor runs. A page that shrinks by less than about 5% is stored raw. This costs at most a twentieth on disk and saves
its load the decompression. Knows nothing of slots and segments.

Thread-safety: any thread may call every function. zstd contexts are per thread, because zstandard forbids sharing them.

Invariant: 1. `decode(tag, payload)` returns exactly the page that `encode(page)` was given.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, NamedTuple

import lz4.block
import zstandard

from tmemfs.errors import BadValue, Corrupt
from tmemfs.units import PAGE_BYTES

ZERO: Final = 1
RAW: Final = 2
FILL: Final = 3
LZ4: Final = 4
ZSTD: Final = 5
#: Encoded with the dictionary of its segment; dictionary.py decodes it.
ZSTD_DICT: Final = 6
#: The record of such a dictionary. It is not a page, and no handle has this tag.
DICTIONARY: Final = 7
TAG_NAMES: Final = {ZERO: "zero", RAW: "raw", FILL: "fill", LZ4: "lz4", ZSTD: "zstd", ZSTD_DICT: "zstd-dict"}

ZERO_PAGE: Final = bytes(PAGE_BYTES)
WORD_BYTES: Final = 8
WORDS_PER_PAGE: Final = PAGE_BYTES // WORD_BYTES
#: Largest payload that is kept compressed: 4096 / 1.05. Above it the page is stored raw.
LARGEST_COMPRESSED_BYTES: Final = 3900
ZSTD_LEVELS: Final = range(1, 20)
#: Frames without the magic number of 4 bytes: the tag says already that they are zstd's.
ZSTD_FORMAT: Final = zstandard.FORMAT_ZSTD1_MAGICLESS
CHOICES: Final = ("lz4", "zstd", "none")

Buffer = bytes | memoryview
Packed = tuple[int, bytes]


class Codec(NamedTuple):
    """A compressor and the tag of its payloads. `compress` is None for a codec that stores pages as they are."""

    name: str
    tag: int
    compress: Callable[[bytes], bytes] | None


def parse_codec(text: str) -> Codec:
    """Return the codec named 'lz4', 'zstd', 'zstd:LEVEL' or 'none'. Raises BadValue."""
    name, _, level_text = text.strip().partition(":")
    if name == "lz4" and not level_text:
        return Codec("lz4", LZ4, _compress_lz4)
    if name == "none" and not level_text:
        return Codec("none", RAW, None)
    if name == "zstd":
        level = parse_level(level_text) if level_text else 1
        return Codec(f"zstd:{level}", ZSTD, _zstd_compressor(level))
    raise BadValue(f"unknown codec {text.strip()!r}: choose lz4, zstd, zstd:LEVEL (1 to {ZSTD_LEVELS[-1]}) or none")


def parse_level(text: str) -> int:
    """Return the level of zstd that `text` names. Raises BadValue."""
    # int() rejects thousands of digits with a message of its own, so longer texts never get there.
    level = int(text) if len(text) <= 2 and text.isdecimal() else 0
    if level not in ZSTD_LEVELS:
        raise BadValue(f"zstd has no level {text!r}: give zstd:1 to zstd:{ZSTD_LEVELS[-1]}")
    return level


def zstd_parameters(level: int) -> zstandard.ZstdCompressionParameters:
    """Return the parameters that compress single pages at `level`, without a magic number."""
    # The size of the source makes zstd choose tables for a page. Those for sources of any size are larger.
    # With the content size in the frame, a decoder allocates a page and not more. A dictionary's id is left out, because the
    # segment table has its number.
    return zstandard.ZstdCompressionParameters.from_level(
        level, format=ZSTD_FORMAT, source_size=PAGE_BYTES, write_content_size=True, write_dict_id=False
    )


def encode(page: bytes, codec: Codec) -> Packed:
    """Return (tag, payload) of one page of PAGE_BYTES. The payload of a zero page is empty, that of a raw page is `page`."""
    # Every page that is stored is looked at. Most are told from a filled one by their ends, without a look at the rest.
    word = page[:WORD_BYTES]
    if word == page[-WORD_BYTES:] and page == word * WORDS_PER_PAGE:
        return (ZERO, b"") if page == ZERO_PAGE else (FILL, word)
    if codec.compress is not None:
        payload = codec.compress(page)
        if len(payload) <= LARGEST_COMPRESSED_BYTES:
            return codec.tag, payload
    return RAW, page


def encode_pages(pages: memoryview, codec: Codec) -> list[Packed]:
    """Return (tag, payload) of every page in `pages`, whose length is a multiple of PAGE_BYTES. The result shares no memory.

    This is `encode` with its lz4 case written out and no copy of the page: 8.7 us per page instead of 9.1.
    """
    if codec.tag != LZ4:
        return [encode(bytes(pages[at : at + PAGE_BYTES]), codec) for at in range(0, len(pages), PAGE_BYTES)]
    compress = lz4.block.compress
    # As words, two ends of a page compare without two slices.
    words = pages.cast("Q")
    packed: list[Packed] = []
    append = packed.append
    for at in range(0, len(pages), PAGE_BYTES):
        page = pages[at : at + PAGE_BYTES]
        if words[at >> 3] == words[(at >> 3) + WORDS_PER_PAGE - 1]:
            append(encode(bytes(page), codec))
            continue
        # No size in front of the block (False): every payload decodes to a page, and 4 bytes per record are saved.
        payload = compress(page, "default", False)
        append((LZ4, payload) if len(payload) <= LARGEST_COMPRESSED_BYTES else (RAW, bytes(page)))
    return packed


def decode(tag: int, payload: Buffer) -> bytes:
    """Return the page of PAGE_BYTES that was encoded as (tag, payload). Raises Corrupt."""
    try:
        page = _DECODERS[tag](payload)
    # A damaged payload can claim any size: ValueError and MemoryError come from one that no memory holds.
    except (KeyError, lz4.block.LZ4BlockError, zstandard.ZstdError, ValueError, MemoryError) as error:
        raise Corrupt(f"a record does not decode ({TAG_NAMES.get(tag, tag)}: {error}): restore the page's owner") from error
    # Decoders accept a damaged payload that happens to be a shorter valid one.
    if len(page) != PAGE_BYTES:
        raise Corrupt(f"a record decodes to {len(page)} bytes, not a page: restart the page's owner")
    return page


def _compress_lz4(page: bytes) -> bytes:
    return bytes(lz4.block.compress(page, "default", False))


def _decompress_lz4(payload: Buffer) -> bytes:
    return bytes(lz4.block.decompress(payload, PAGE_BYTES))


class _ZstdContexts(threading.local):
    """The calling thread's compressors, by level, and its decompressor."""

    def __init__(self) -> None:
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}
        self.decompressor = zstandard.ZstdDecompressor(format=ZSTD_FORMAT)

    def compressor(self, level: int) -> zstandard.ZstdCompressor:
        # A context is expensive to make and holds the tables of its level, so each thread makes only those it uses, once.
        if level not in self.compressors:
            self.compressors[level] = zstandard.ZstdCompressor(compression_params=zstd_parameters(level))
        return self.compressors[level]


_zstd = _ZstdContexts()


def _zstd_compressor(level: int) -> Callable[[bytes], bytes]:
    def compress(page: bytes) -> bytes:
        return _zstd.compressor(level).compress(page)

    return compress


def _decompress_zstd(payload: Buffer) -> bytes:
    return _zstd.decompressor.decompress(payload, max_output_size=PAGE_BYTES)


_DECODERS: Final[dict[int, Callable[[Buffer], bytes]]] = {
    ZERO: lambda payload: ZERO_PAGE,
    RAW: bytes,
    FILL: lambda payload: bytes(payload) * WORDS_PER_PAGE,
    LZ4: _decompress_lz4,
    ZSTD: _decompress_zstd,
}
