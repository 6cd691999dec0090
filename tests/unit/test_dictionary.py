"""Dictionaries: what was encoded with one comes back, and only with that one; it lies at the start of its segment, verified."""

from __future__ import annotations

from random import Random

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tmemfs.errors import Corrupt
from tmemfs.store.codec import DICTIONARY, TAG_NAMES
from tmemfs.store.dictionary import (
    DICTIONARY_BYTES,
    DICTIONARY_RECORD_BYTES,
    DICTIONARY_SLOT,
    LEAST_SAMPLES,
    Dictionaries,
    Dictionary,
    Encoder,
    read_dictionary,
    train,
)
from tmemfs.store.record import LARGEST_RECORD_BYTES, scan, segment_seed
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES

DATA = b"".join(b"what page %d has in common with others. " % number for number in range(100))


def page_like(number: int) -> bytes:
    """Pages that share words of their own language, which no other language has."""
    words = [Random(word).randbytes(12) for word in range(60)]
    random = Random(number)
    return b"".join(random.choice(words) for _ in range(PAGE_BYTES // 12 + 1))[:PAGE_BYTES]


@given(data=st.binary(max_size=300), start=st.binary(max_size=300), seed=st.integers(0, 9), level=st.integers(1, 19))
def test_any_page_comes_back_with_any_dictionary(data: bytes, start: bytes, seed: int, level: int) -> None:
    page = start + page_like(seed)[len(start) :]
    dictionary = Dictionary(1, data)
    assert dictionary.decode(Encoder(dictionary, level).encode(page)) == page


@pytest.mark.parametrize("payload", [b"", b"nonsense", bytes(100)])
def test_what_does_not_decode_is_an_error(payload: bytes) -> None:
    with pytest.raises(Corrupt, match="restart the page's owner"):
        Dictionary(1, DATA).decode(payload)


def test_what_does_not_decode_to_a_page_is_an_error() -> None:
    payload = Encoder(Dictionary(1, DATA), 3).encode(b"too short")
    with pytest.raises(Corrupt, match="9 bytes, not a page"):
        Dictionary(1, DATA).decode(payload)


def test_training_pays_for_pages_that_have_something_in_common() -> None:
    data = train([page_like(number) for number in range(128)])
    assert data is not None and len(data) <= DICTIONARY_BYTES
    without = zstandard.ZstdCompressor(level=3)
    encoder = Encoder(Dictionary(1, data), 3)
    others = [page_like(number) for number in range(1000, 1020)]
    assert sum(len(encoder.encode(page)) for page in others) < 0.8 * sum(len(without.compress(page)) for page in others)


def test_too_few_pages_or_empty_ones_teach_nothing() -> None:
    assert train([page_like(number) for number in range(LEAST_SAMPLES - 1)]) is None
    assert train([b""] * 100) is None


def test_a_dictionary_is_a_record_at_the_start_of_its_segment() -> None:
    segment = memoryview(bytearray(SEGMENT_BYTES))
    seed = segment_seed(7)
    end = Dictionary(3, DATA).write_to(segment, seed)
    assert end <= DICTIONARY_RECORD_BYTES <= LARGEST_RECORD_BYTES
    assert list(scan(segment, end)) == [(0, DICTIONARY_SLOT, DICTIONARY, len(DATA))]
    assert read_dictionary(segment[:DICTIONARY_RECORD_BYTES], seed) == DATA


@pytest.mark.parametrize("at", [0, 3, 8, 11, 12, 500])
def test_a_damaged_one_is_an_error(at: int) -> None:
    segment = memoryview(bytearray(SEGMENT_BYTES))
    Dictionary(3, DATA).write_to(segment, segment_seed(7))
    segment[at] ^= 0x10
    with pytest.raises(Corrupt):
        read_dictionary(segment, segment_seed(7))


def test_that_of_another_use_of_the_segment_is_an_error() -> None:
    segment = memoryview(bytearray(SEGMENT_BYTES))
    Dictionary(3, DATA).write_to(segment, segment_seed(7))
    with pytest.raises(Corrupt):
        read_dictionary(segment, segment_seed(8))


def test_a_number_means_one_dictionary_and_is_not_given_twice() -> None:
    dictionaries = Dictionaries()
    first = dictionaries.add(b"first")
    dictionaries.number_above(6)
    second = dictionaries.add(b"second")
    assert (first.number, second.number, len(dictionaries)) == (1, 7, 2)
    assert dictionaries.adopt(7, b"again") is second
    dictionaries.keep_only({7})
    assert dictionaries.known(1) is None and dictionaries.known(7) is second
    assert dictionaries.adopt(1, b"first").data == b"first" and dictionaries.add(b"third").number == 8


def test_no_page_bears_the_tag_of_a_dictionary() -> None:
    assert DICTIONARY not in TAG_NAMES
