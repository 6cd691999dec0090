"""Stores that are refused because everything is full: what they cost, what they forget, and how it ends.

The kernel writes a refused page again and again until its OOM killer acts, tens of times for each page that it could reclaim. So a
refusal must cost next to nothing, and be over as soon as there is a free frame.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from struct import Struct

import pytest

from tests.faults.test_engine import background, engine, fill_up, finish, load, raw, services, tier, until
from tests.faults.test_relay import INODE, Kernel, kernel
from tests.parts import FaultyTier, page_of
from tmemfs.engine import Engine
from tmemfs.errors import NoSpace
from tmemfs.fuse import wire
from tmemfs.jobs import shrinker as shrinker_module
from tmemfs.pages import pager as pager_module
from tmemfs.pages.pager import Deferred
from tmemfs.services import Services
from tmemfs.store.consistency import check
from tmemfs.units import PAGE_BYTES

__all__ = ["background", "engine", "kernel", "services", "tier"]  # fixtures

REFUSED = 1000
_WRITE = Struct("<IIQQ16xQQI20x")  # header, fh, offset, size and the rest


@pytest.fixture
async def full(background: None, engine: Engine, tier: FaultyTier) -> Engine:
    """An engine whose tier fails and whose pool is full, slots 0 to 15 stored."""
    await finish(engine.pager.write(0, memoryview(b"".join(map(raw, range(16))))))
    await fill_up(engine, tier)
    await until(lambda: engine.free_frames.stuck)
    return engine


class Counted:
    """Calls of a function."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        self.calls = 0
        self._function: Callable[..., object] = getattr(owner, name)
        monkeypatch.setattr(owner, name, self)

    def __call__(self, *arguments: object, **named: object) -> object:
        self.calls += 1
        return self._function(*arguments, **named)


async def test_a_refused_store_is_neither_encoded_nor_deferred(full: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = Counted(monkeypatch, pager_module, "encode_pages")
    inserted = Counted(monkeypatch, full.tmem, "store")
    before = full.pager.refused
    for number in range(REFUSED):
        with pytest.raises(NoSpace, match="injected"):
            full.pager.write(number % 8 * PAGE_BYTES, memoryview(raw(number) * 2))
    assert (encoded.calls, inserted.calls) == (0, 0)
    assert full.pager.refused == before + REFUSED


async def test_pages_of_a_refused_store_are_forgotten_and_no_others(full: Engine) -> None:
    with pytest.raises(NoSpace):
        full.pager.write(3 * PAGE_BYTES, memoryview(raw(99) * 2))
    assert [await load(full, slot) for slot in range(2, 6)] == [raw(2), bytes(PAGE_BYTES), bytes(PAGE_BYTES), raw(5)]
    check(full.tmem)


async def test_a_refused_store_leaves_pages_that_it_covers_in_part(full: Engine) -> None:
    with pytest.raises(NoSpace):
        full.pager.write(3 * PAGE_BYTES + 512, memoryview(raw(99) * 2))
    assert [await load(full, slot) for slot in range(3, 6)] == [raw(3), bytes(PAGE_BYTES), raw(5)]
    with pytest.raises(NoSpace):
        full.pager.write(7 * PAGE_BYTES + 512, memoryview(b"x" * 512))
    assert await load(full, 7) == raw(7)


async def test_a_full_store_takes_pages_of_zeros(full: Engine) -> None:
    assert full.pager.write(0, memoryview(bytes(2 * PAGE_BYTES))) is None
    with pytest.raises(NoSpace):
        full.pager.write(4 * PAGE_BYTES, memoryview(bytes(2 * PAGE_BYTES - 1) + b"x"))
    assert [await load(full, slot) for slot in range(3)] == [bytes(PAGE_BYTES), bytes(PAGE_BYTES), raw(2)]


async def test_a_free_frame_ends_the_refusals_although_the_tier_still_fails(full: Engine) -> None:
    with pytest.raises(NoSpace):
        full.pager.write(0, memoryview(raw(99)))
    assert full.free_frames.stuck
    await finish(full.pager.discard(0, 3000 * PAGE_BYTES))
    await until(lambda: full.tmem.arena.has_free_frame)
    await finish(full.pager.write(0, memoryview(raw(99))))
    assert await load(full, 0) == raw(99)


async def test_a_tier_that_works_again_ends_the_refusals_although_nothing_is_stored(
    full: Engine, tier: FaultyTier, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shrinker_module, "RETRY_S", 0.01)
    tier.fail()
    await until(lambda: services.state() == "running" and full.tmem.arena.has_free_frame)
    assert full.pager.write(0, memoryview(raw(99))) is None
    assert await load(full, 0) == raw(99)


async def test_no_old_page_is_ever_loaded_while_a_store_fills_up_and_empties(
    background: None, engine: Engine, tier: FaultyTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shrinker_module, "RETRY_S", 0.001)
    chance, pages, refused = random.Random(11), dict[int, bytes](), 0
    for number in range(240):
        tier.fail(*(("write",) if number // 40 % 2 else ()))
        first, count = chance.randrange(0, 4096, 8), chance.choice((1, 8, 64))
        if chance.random() < 0.1:
            await finish(engine.pager.discard(first * PAGE_BYTES, count * PAGE_BYTES))
            written = dict.fromkeys(range(first, first + count), bytes(PAGE_BYTES))
        else:
            written = {slot: page_of("raw", number << 16 | slot) for slot in range(first, first + count)}
            refused += await _store(engine, first, written)
        pages |= written
    for slot, page in pages.items():
        assert await load(engine, slot) in (page, bytes(PAGE_BYTES)), slot
    assert refused
    check(engine.tmem)


async def _store(engine: Engine, first: int, written: dict[int, bytes]) -> bool:
    """Store `written`; whether that was refused."""
    try:
        await finish(engine.pager.write(first * PAGE_BYTES, memoryview(b"".join(written.values()))))
    except NoSpace:
        return True
    assert all([await load(engine, slot) == page for slot, page in list(written.items())[::8]])
    return False


def test_the_page_path_answers_what_is_refused_without_another_thread(kernel: Kernel) -> None:
    pager, tmem = kernel.pager, kernel.pager._tmem
    tmem.limit_pool(tmem.pool_bytes)
    slot = 1100
    while not isinstance(pager.write(slot * PAGE_BYTES, memoryview(page_of("raw", slot))), Deferred):
        slot += 1
    assert not tmem.arena.has_free_frame
    pager._free_frames.set_stuck("nothing can be written")
    deferred = kernel.relay.statistics()["deferred"]
    for unique in range(REFUSED):
        length = wire.IO_BYTES + PAGE_BYTES
        head = _WRITE.pack(length, wire.WRITE, unique, INODE, 0, (1100 + unique % 64) * PAGE_BYTES, PAGE_BYTES)
        kernel.end.send(head + page_of("raw", unique))
        assert wire.REPLY.unpack(kernel.end.recv(PAGE_BYTES)) == (wire.REPLY_BYTES, -errno.ENOSPC, unique)
    assert kernel.relay.statistics()["deferred"] == deferred and pager.refused >= REFUSED
