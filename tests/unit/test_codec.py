"""Codecs: every page comes back, a damaged payload never does as something else than a page, errors say what to choose."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.parts import KINDS, Kind, page_of
from tmemfs.errors import BadValue, Corrupt
from tmemfs.store.codec import (
    CHOICES,
    FILL,
    LARGEST_COMPRESSED_BYTES,
    LZ4,
    RAW,
    TAG_NAMES,
    WORDS_PER_PAGE,
    ZERO,
    ZERO_PAGE,
    ZSTD,
    Codec,
    decode,
    encode,
    encode_pages,
    parse_codec,
)
from tmemfs.units import PAGE_BYTES

CODECS = ("lz4", "zstd", "zstd:7", "zstd:19", "none")
#: Descriptor and content size of the frames we write: what is behind them may be damaged in any way.
ZSTD_HEADER_BYTES = 3
SEEDS = st.integers(0, 1 << 20)
EDITS = st.lists(st.tuples(st.integers(0, PAGE_BYTES - 1), st.integers(0, 255)), max_size=8)


@st.composite
def pages(draw: st.DrawFn) -> bytes:
    """A page of any kind, a few bytes of it changed."""
    page = bytearray(page_of(draw(st.sampled_from(KINDS)), draw(SEEDS)))
    for at, byte in draw(EDITS):
        page[at] = byte
    return bytes(page)


def page_of_lz4_payload(size: int) -> bytes:
    """A page whose lz4 payload has exactly `size` bytes: as many random bytes as that takes, then zeros."""
    compress = parse_codec("lz4").compress
    assert compress is not None
    noise = Random(size).randbytes(PAGE_BYTES)
    for length in range(size - 64, size):
        page = noise[:length].ljust(PAGE_BYTES, b"\0")
        if len(compress(page)) == size:
            return page
    raise AssertionError(f"no page with a payload of {size} bytes")


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_codec_gives_every_kind_of_page_back(name: str, kind: Kind) -> None:
    page = page_of(kind, 7)
    tag, payload = encode(page, parse_codec(name))
    assert decode(tag, payload) == page
    assert decode(tag, memoryview(payload)) == page


@given(pages(), st.sampled_from(CODECS))
def test_any_page_comes_back(page: bytes, name: str) -> None:
    assert decode(*encode(page, parse_codec(name))) == page


@pytest.mark.parametrize("name", CODECS)
def test_a_zero_page_has_no_payload(name: str) -> None:
    assert encode(ZERO_PAGE, parse_codec(name)) == (ZERO, b"")


@pytest.mark.parametrize("name", CODECS)
def test_the_payload_of_a_repeated_word_is_the_word(name: str) -> None:
    assert encode(b"abcdefgh" * WORDS_PER_PAGE, parse_codec(name)) == (FILL, b"abcdefgh")


@given(st.binary(min_size=8, max_size=8), st.integers(0, PAGE_BYTES - 1), st.integers(1, 255), st.sampled_from(CODECS))
def test_a_page_that_differs_in_one_byte_is_not_one_word(word: bytes, at: int, change: int, name: str) -> None:
    page = bytearray(word * WORDS_PER_PAGE)
    page[at] ^= change
    tag, payload = encode(bytes(page), parse_codec(name))
    assert tag not in (ZERO, FILL)
    assert decode(tag, payload) == page


@pytest.mark.parametrize("name", CODECS)
def test_an_incompressible_page_is_its_own_payload(name: str) -> None:
    page = page_of("raw", 3)
    assert encode(page, parse_codec(name)) == (RAW, page)


@pytest.mark.parametrize(("name", "expected"), [("lz4", LZ4), ("zstd", ZSTD), ("zstd:19", ZSTD), ("none", RAW)])
def test_text_is_compressed_by_the_codec_of_its_tag(name: str, expected: int) -> None:
    tag, payload = encode(page_of("text", 5), parse_codec(name))
    assert tag == expected
    assert len(payload) == PAGE_BYTES if name == "none" else len(payload) < 100


@given(st.lists(pages(), max_size=6), st.sampled_from(CODECS))
def test_many_pages_are_encoded_as_each_is(some: list[bytes], name: str) -> None:
    codec = parse_codec(name)
    assert encode_pages(memoryview(b"".join(some)), codec) == [encode(page, codec) for page in some]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_encoded_shares_no_memory_with_the_request(name: str, kind: Kind) -> None:
    request = bytearray(page_of(kind, 11))
    packed = encode_pages(memoryview(request), parse_codec(name))
    request[:] = b"\xff" * PAGE_BYTES
    assert decode(*packed[0]) == page_of(kind, 11)


def test_the_largest_payload_is_a_page_by_1_05() -> None:
    assert int(PAGE_BYTES / 1.05) == LARGEST_COMPRESSED_BYTES


@pytest.mark.parametrize("size", [LARGEST_COMPRESSED_BYTES, LARGEST_COMPRESSED_BYTES + 1])
def test_a_payload_above_the_largest_is_dropped_for_the_page(size: int) -> None:
    page, payload = page_of("text", 1), bytes(size)
    codec = Codec("of one size", ZSTD, lambda page: payload)
    expected = (ZSTD, payload) if size == LARGEST_COMPRESSED_BYTES else (RAW, page)
    assert encode(page, codec) == expected
    assert encode_pages(memoryview(page), codec) == [expected]


@pytest.mark.parametrize("size", [LARGEST_COMPRESSED_BYTES, LARGEST_COMPRESSED_BYTES + 1])
def test_the_written_out_lz4_case_has_the_same_boundary(size: int) -> None:
    page = page_of_lz4_payload(size)
    [(tag, payload)] = encode_pages(memoryview(page), parse_codec("lz4"))
    assert (tag, len(payload)) == ((LZ4, size) if size == LARGEST_COMPRESSED_BYTES else (RAW, PAGE_BYTES))
    assert decode(tag, payload) == page


@pytest.mark.parametrize(
    ("text", "name", "tag"),
    [
        ("lz4", "lz4", LZ4),
        (" lz4\n", "lz4", LZ4),
        ("none", "none", RAW),
        ("zstd", "zstd:1", ZSTD),
        ("zstd:1", "zstd:1", ZSTD),
        ("zstd:19", "zstd:19", ZSTD),
    ],
)
def test_a_codec_is_named_with_its_level(text: str, name: str, tag: int) -> None:
    codec = parse_codec(text)
    assert (codec.name, codec.tag) == (name, tag)


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_that_is_shown_is_a_codec(name: str) -> None:
    assert parse_codec(name).name.partition(":")[0] == name


@pytest.mark.parametrize("text", ["", "lzma", "LZ4", "lz4:3", "none:1", "zstd 3", ":3"])
def test_an_unknown_codec_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(BadValue, match=r"choose lz4, zstd, zstd:LEVEL \(1 to 19\) or none"):
        parse_codec(text)


@pytest.mark.parametrize("text", ["zstd:0", "zstd:20", "zstd:-1", "zstd:x", "zstd:1.5", "zstd: 3", "zstd:3:4"])
def test_a_level_that_is_none_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(BadValue, match="give zstd:1 to zstd:19"):
        parse_codec(text)


@pytest.mark.parametrize("tag", sorted(set(range(8)) - TAG_NAMES.keys()))
def test_a_tag_nobody_writes_does_not_decode(tag: int) -> None:
    with pytest.raises(Corrupt, match="does not decode"):
        decode(tag, page_of("raw", 1))


@pytest.mark.parametrize(
    ("tag", "size"), [(RAW, 0), (RAW, PAGE_BYTES - 1), (RAW, PAGE_BYTES + 1), (FILL, 0), (FILL, 7), (FILL, 9), (LZ4, 0), (ZSTD, 0)]
)
def test_a_payload_of_the_wrong_length_does_not_decode(tag: int, size: int) -> None:
    with pytest.raises(Corrupt):
        decode(tag, bytes(size))


@pytest.mark.parametrize("name", ["lz4", "zstd"])
@pytest.mark.parametrize("size", [PAGE_BYTES - 1, PAGE_BYTES + 1])
def test_what_decodes_to_more_or_less_than_a_page_is_corrupt(name: str, size: int) -> None:
    codec = parse_codec(name)
    assert codec.compress is not None
    with pytest.raises(Corrupt):
        decode(codec.tag, codec.compress(b"a" * size))


@given(
    page=pages(),
    name=st.sampled_from(CODECS),
    flips=st.lists(st.tuples(st.integers(0, PAGE_BYTES), st.integers(0, 7)), min_size=1, max_size=4),
    cut=st.integers(0, 40),
    more=st.binary(max_size=8),
)
def test_a_damaged_payload_is_a_page_or_corrupt(
    page: bytes, name: str, flips: list[tuple[int, int]], cut: int, more: bytes
) -> None:
    tag, payload = encode(page, parse_codec(name))
    damaged = bytearray(payload)
    safe = ZSTD_HEADER_BYTES if tag == ZSTD else 0  # the bug below
    for at, bit in flips:
        if payload:
            damaged[safe + at % (len(payload) - safe)] ^= 1 << bit
    damaged = damaged[: max(len(damaged) - cut, safe)] + more
    try:
        decoded = decode(tag, bytes(damaged))
    except Corrupt:
        return
    assert len(decoded) == PAGE_BYTES


def test_a_frame_that_says_it_is_larger_than_memory_is_corrupt() -> None:
    descriptor_of_8_bytes_of_size = b"\xe0"
    with pytest.raises(Corrupt):
        decode(ZSTD, descriptor_of_8_bytes_of_size + (1 << 62).to_bytes(8, "little") + b"\x01\x00\x00")


@pytest.mark.parametrize("name", CODECS)
def test_threads_do_not_share_a_compressor(name: str) -> None:
    codec = parse_codec(name)
    some = [page_of(kind, seed) for seed in range(12) for kind in KINDS]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda page: decode(*encode(page, codec)), some)) == some
