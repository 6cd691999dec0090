"""The encrypted tier: what is written is read back from any sector on, and what lies below says nothing."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from random import Random

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import given
from hypothesis import strategies as st

from tests.parts import FaultyTier, new_tmem, page_of
from tmemfs.errors import BackingFull, Corrupt, TierError
from tmemfs.pages.reader import Reader
from tmemfs.store.codec import encode, parse_codec
from tmemfs.system.key import KEY_BYTES, Key
from tmemfs.tiers.encrypted import EncryptedTier
from tmemfs.tiers.in_memory import MemoryTier
from tmemfs.tiers.tier import Extent
from tmemfs.units import BLOCK_BYTES, SECTOR_BYTES, SEGMENT_BYTES

EXTENT = Extent(3)
SEQUENCES = (1, 1 << 29, (1 << 64) - 1)
NOISE = Random(5).randbytes(SEGMENT_BYTES)


@pytest.fixture(scope="module")
def key() -> Iterator[Key]:
    key = Key.create()
    yield key
    key.close()


@pytest.fixture
def inner() -> FaultyTier:
    return FaultyTier()


@pytest.fixture
def tier(inner: FaultyTier, key: Key) -> EncryptedTier:
    return EncryptedTier(inner, key)


def segment(content: bytes = NOISE) -> memoryview:
    """Page-aligned memory that holds `content`."""
    view = memoryview(mmap.mmap(-1, len(content)))
    view[:] = content
    return view


def read(tier: EncryptedTier | FaultyTier, offset: int, size: int, sequence: int) -> bytes:
    into = memoryview(mmap.mmap(-1, size))
    tier.read(EXTENT, offset, into, sequence)
    return bytes(into)


def below(inner: FaultyTier) -> bytes:
    return inner.inner.extents[EXTENT]


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_a_segment_comes_back_and_nothing_of_it_lies_below(tier: EncryptedTier, inner: FaultyTier, sequence: int) -> None:
    tier.write(EXTENT, segment(), sequence)
    assert read(tier, 0, SEGMENT_BYTES, sequence) == NOISE
    assert len(below(inner)) == SEGMENT_BYTES
    assert not any(below(inner)[at : at + 16] in NOISE for at in range(0, SEGMENT_BYTES, SECTOR_BYTES))


def test_what_lies_below_is_aes_256_with_the_sequence_and_the_number_of_the_block_as_counter(
    tier: EncryptedTier, inner: FaultyTier, key: Key
) -> None:
    sequence = 0x0123_4567_89AB_CDEF
    tier.write(EXTENT, segment(), sequence)
    context = Cipher(AES256(bytes(key.view)), CTR(sequence.to_bytes(8, "big") + bytes(8))).encryptor()
    assert below(inner) == context.update(NOISE)
    at = 200 * SECTOR_BYTES
    context = Cipher(AES256(bytes(key.view)), CTR(sequence.to_bytes(8, "big") + (at // 16).to_bytes(8, "big"))).encryptor()
    assert below(inner)[at:][:SECTOR_BYTES] == context.update(NOISE[at:][:SECTOR_BYTES])


@pytest.fixture(scope="module")
def written(key: Key) -> EncryptedTier:
    """A tier of the same noise under several sequence numbers, each in the extent of its index."""
    tier = EncryptedTier(MemoryTier(1 << 30), key)
    for number, sequence in enumerate(SEQUENCES):
        tier.write(Extent(number), segment(), sequence)
    return tier


@given(first=st.integers(0, 2047), count=st.integers(1, 64), which=st.sampled_from(range(3)))
def test_any_sectors_are_read_without_the_others(written: EncryptedTier, first: int, count: int, which: int) -> None:
    offset, size = first * SECTOR_BYTES, min(count, 2048 - first) * SECTOR_BYTES
    into = segment(bytes(size))
    written.read(Extent(which), offset, into, SEQUENCES[which])
    assert into == NOISE[offset : offset + size]


def test_the_frame_is_not_changed(tier: EncryptedTier) -> None:
    data = segment()
    tier.write(EXTENT, data, 7)
    assert bytes(data) == NOISE


def test_a_write_that_is_tried_again_writes_the_same_bytes(tier: EncryptedTier, inner: FaultyTier) -> None:
    inner.tears = True
    inner.fail("write")
    with pytest.raises(TierError, match="injected"):
        tier.write(EXTENT, segment(), 7)
    torn = below(inner)
    inner.tears = False
    inner.fail()
    tier.write(EXTENT, segment(), 7)
    assert below(inner)[: len(torn)] == torn


def test_segments_with_the_same_data_have_nothing_in_common_below(tier: EncryptedTier, inner: FaultyTier) -> None:
    seen = set[bytes]()
    for sequence in (1, 2, 1 << 32, 1 << 63):
        tier.write(EXTENT, segment(bytes(BLOCK_BYTES)), sequence)
        seen |= {below(inner)[at : at + 16] for at in range(0, BLOCK_BYTES, 16)}
    assert len(seen) == 4 * BLOCK_BYTES // 16


def test_two_keys_encrypt_differently(tier: EncryptedTier, inner: FaultyTier) -> None:
    tier.write(EXTENT, segment(bytes(BLOCK_BYTES)), 1)
    first, other = below(inner), Key.create()
    EncryptedTier(inner, other).write(EXTENT, segment(bytes(BLOCK_BYTES)), 1)
    assert below(inner) != first
    other.close()


@pytest.mark.parametrize("wrong", ["key", "sequence"])
def test_a_page_that_is_decrypted_with_the_wrong_key_or_sequence_is_an_error(wrong: str, inner: FaultyTier, key: Key) -> None:
    tmem = new_tmem(slots=64, frames=4, limit=4, extents=4)
    tmem.store(0, [encode(page_of("text", 1), parse_codec("lz4"))])
    plan = tmem.plan_write_back(include_open=True)
    assert plan is not None
    used, other = EncryptedTier(inner, key), Key.create()
    used.write(plan.extent, plan.data, plan.sequence + (wrong == "sequence"))
    tmem.commit_write_back(plan)
    with pytest.raises(Corrupt, match="slot 0 is damaged"):
        Reader(tmem, EncryptedTier(inner, other) if wrong == "key" else used).load(0)
    used.write(plan.extent, plan.data, plan.sequence)
    assert Reader(tmem, used).load(0) == page_of("text", 1)
    other.close()


def test_threads_that_read_and_write_at_once_do_not_disturb_each_other(tier: EncryptedTier) -> None:
    failures = list[str]()

    def work(number: int) -> None:
        content = Random(number).randbytes(4 * BLOCK_BYTES)
        data, into = segment(content), segment(bytes(len(content)))
        for sequence in range(number, 400, 8):
            tier.write(Extent(number), data, sequence)
            tier.read(Extent(number), 0, into, sequence)
            if bytes(into) != content:
                failures.append(f"thread {number}, sequence {sequence}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_errors_of_the_tier_below_are_passed_on_and_it_goes_on(tier: EncryptedTier, inner: FaultyTier) -> None:
    def full() -> None:
        raise BackingFull("injected")

    inner.before["write"] = full
    with pytest.raises(BackingFull):
        tier.write(EXTENT, segment(), 1)
    inner.fail("read")
    with pytest.raises(TierError):
        read(tier, 0, SECTOR_BYTES, 1)
    inner.fail()
    tier.write(EXTENT, segment(), 2)
    assert read(tier, 0, SEGMENT_BYTES, 2) == NOISE


def test_it_is_as_large_as_the_tier_below_and_discards_in_that(tier: EncryptedTier, inner: FaultyTier) -> None:
    assert tier.is_encrypted and not inner.is_encrypted
    for name in ("name", "capacity_bytes", "most_extents", "sector_bytes", "can_discard"):
        assert getattr(tier, name) == getattr(inner, name)
    inner.can_discard = False
    assert not tier.can_discard
    inner.can_discard = True
    tier.write(EXTENT, segment(), 1)
    tier.discard((EXTENT,))
    assert not inner.inner.extents


def test_its_end_is_that_of_the_tier_below_and_of_the_key(inner: FaultyTier) -> None:
    key = Key.create()
    adopted = Key.adopt(os.dup(key.fd))
    tier = EncryptedTier(inner, key)
    tier.write(EXTENT, segment(), 1)
    tier.close()
    assert not inner.inner.extents and bytes(adopted.view) == bytes(KEY_BYTES)
    adopted.close()


def test_a_thread_that_is_warmed_has_its_cipher_though_nothing_can_be_read(
    tier: EncryptedTier, inner: FaultyTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[object]()
    make = Cipher.encryptor

    def noted(cipher: Cipher[CTR]) -> CipherContext:
        made.append(cipher)
        return make(cipher)

    monkeypatch.setattr(Cipher, "encryptor", noted)
    reader = Reader(new_tmem(slots=64, frames=4, limit=4, extents=4), tier)
    seen = list[int]()

    def work() -> None:
        inner.fail("read")
        reader.warm()
        seen.append(len(made))
        inner.fail()
        reader.warm()
        tier.write(EXTENT, segment(), 1)
        read(tier, 0, SECTOR_BYTES, 1)
        seen.append(len(made))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [1, 1]
