"""The recompressor: what it makes smaller, what it leaves alone, and what damage does to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from random import Random

import pytest
import trio

from tests.parts import FaultyTier, Regions, page_of
from tests.waiting import HANG_S
from tmemfs.engine import Engine
from tmemfs.errors import BadValue, Corrupt
from tmemfs.jobs.compact_request import CompactRequest
from tmemfs.jobs.recompressor import DEFAULT_LEVEL, parse_recompress
from tmemfs.jobs.shrink_request import ShrinkRequest
from tmemfs.pages.pager import Deferred
from tmemfs.store.codec import decode, parse_codec
from tmemfs.store.consistency import check
from tmemfs.store.dictionary import Encoder
from tmemfs.store.recompression import SAMPLES, Recompression, Use
from tmemfs.store.record import handle_offset, handle_segment
from tmemfs.store.statistics import statistics
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES

SLOTS = 16384
#: Pages of `language` that fill a segment, and some.
SEGMENT = 700
WORDS = [Random(word).randbytes(10) for word in range(200)]


def language(number: int) -> bytes:
    """150 words of the same 200, and nothing: lz4 cannot know the words, a dictionary does."""
    return b"".join(Random(number).choices(WORDS, k=150)).ljust(PAGE_BYTES, b"\0")


class Place:
    """An engine that looks often, and a dict that says what its pages are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tmemfs.jobs.recompressor.LOOK_S", 0.01)
        monkeypatch.setattr("tmemfs.jobs.recompressor._REST", 0)
        self._patch = monkeypatch
        self.tier = FaultyTier()
        self.regions = Regions.new(SLOTS, 32, 32)
        self.pages: dict[int, bytes] = {}
        self.start()

    def start(self) -> None:
        """Also after a crash."""
        self.engine = Engine.over(partial(self.regions.start, 28, SLOTS, spare=1), self.tier, parse_codec("lz4"))
        self.tmem = self.engine.tmem
        self.recompressor = self.engine.recompressor
        self.looks = 0
        look = self.recompressor._recompression.look

        def counted(encoder: Encoder | None) -> deque[Use]:
            self.looks += 1
            return look(encoder)

        self._patch.setattr(self.recompressor._recompression, "look", counted)

    async def looked_at(self, times: int) -> None:
        """Let it look for idle segments so often, and do what it finds."""
        before = self.looks
        await _until(lambda: self.looks > before + times)

    def store(self, first: int, count: int, page: Callable[[int], bytes] = language) -> None:
        for slot in range(first, first + count):
            self.pages[slot] = page(slot)
            assert self.engine.pager.write(slot * PAGE_BYTES, memoryview(self.pages[slot])) is None

    async def load(self, slot: int) -> bytes:
        found = self.engine.pager.read(slot * PAGE_BYTES, PAGE_BYTES)
        loaded = await trio.to_thread.run_sync(found.run) if isinstance(found, Deferred) else found
        assert loaded is not None
        return loaded

    async def verify(self) -> None:
        for slot, page in self.pages.items():
            assert await self.load(slot) == page, slot
        check(self.tmem)

    async def recompressed(self, segments: int = 1) -> None:
        """Let it work until so many segments were made."""
        async with trio.open_nursery() as nursery:
            self.recompressor.set_level(DEFAULT_LEVEL)
            nursery.start_soon(self.recompressor.run)
            await _until(lambda: self.recompressor.counts.segments >= segments)
            self.recompressor.set_level(None)
            nursery.cancel_scope.cancel()

    def damage_in_ram(self, slot: int) -> None:
        handle = self.tmem.slots.handles[slot]
        self.tmem.arena.view[self.tmem.segments.base[handle_segment(handle)] + handle_offset(handle) + 100] ^= 0xFF


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(monkeypatch)


async def test_idle_pages_become_smaller_and_come_back_from_ram_and_from_the_tier(place: Place) -> None:
    place.store(0, 4 * SEGMENT)
    before = place.tmem.compressed_bytes
    await place.recompressed()
    now = statistics(place.tmem)
    assert now.compressed_bytes < 0.9 * before and now.zstd_dict_pages > SEGMENT
    assert before - now.compressed_bytes == pytest.approx(place.recompressor.counts.saved_bytes, rel=0.05)
    await place.verify()
    assert (await place.engine.shrinker.shrink(ShrinkRequest.parse("all"))).reason is None
    assert statistics(place.tmem).pages_in_ram == 0
    await place.verify()


async def test_it_is_off_until_it_is_switched_on(place: Place, nursery: trio.Nursery) -> None:
    place.store(0, 2 * SEGMENT)
    nursery.start_soon(place.recompressor.run)
    await trio.sleep(0.1)
    assert place.recompressor.counts.segments == 0 and place.recompressor.dictionaries == 0
    nursery.cancel_scope.cancel()


async def test_what_was_loaded_from_is_not_idle(place: Place, nursery: trio.Nursery) -> None:
    place.store(0, 2 * SEGMENT)
    for slot in range(0, 2 * SEGMENT, 50):
        await place.load(slot)
    place.recompressor.set_level(DEFAULT_LEVEL)
    nursery.start_soon(place.recompressor.run)
    await trio.sleep(0.1)
    assert place.recompressor.counts.segments == 0
    nursery.cancel_scope.cancel()


async def test_what_saves_less_than_a_tenth_is_left_and_not_tried_again(place: Place, nursery: trio.Nursery) -> None:
    place.store(0, 4 * SEGMENT, lambda slot: page_of("half", slot))
    before = [handle for handle in place.tmem.slots.handles if handle]
    place.recompressor.set_level(DEFAULT_LEVEL)
    nursery.start_soon(place.recompressor.run)
    await _until(lambda: place.recompressor.counts.not_worth)
    await place.looked_at(5)  # at all there is
    tried = place.recompressor.counts.not_worth
    await place.looked_at(10)
    assert place.recompressor.counts.not_worth == tried <= 6 and place.recompressor.counts.segments == 0
    assert [handle for handle in place.tmem.slots.handles if handle] == before
    await place.verify()
    nursery.cancel_scope.cancel()


async def test_another_dictionary_is_trained_when_the_last_is_of_no_use(place: Place, nursery: trio.Nursery) -> None:
    place.store(0, 2 * SEGMENT)
    await place.recompressed()
    place.store(4000, 8 * SEGMENT, lambda slot: page_of("half", slot))
    place.recompressor.set_level(DEFAULT_LEVEL)
    nursery.start_soon(place.recompressor.run)
    await _until(lambda: place.recompressor.counts.not_worth)
    place.store(12000, 3 * SEGMENT, lambda slot: language(slot)[::-1])
    made = place.recompressor.counts.segments
    await _until(lambda: place.recompressor.counts.segments > made)
    assert place.recompressor.dictionaries >= 2
    await place.verify()
    nursery.cancel_scope.cancel()


async def test_segments_of_two_dictionaries_are_cleaned_apart(place: Place) -> None:
    for first in (0, 6000):
        place.store(first, 3 * SEGMENT)
        await place.recompressed(place.recompressor.counts.segments + 1)
        place.recompressor._encoder = None
    await place.engine.shrinker.shrink(ShrinkRequest.parse("all"))
    for slot in [slot for slot in place.pages if slot % 4]:
        place.tmem.invalidate(slot, 1)
        del place.pages[slot]
    await place.engine.cleaner.compact(CompactRequest(1.05))
    assert place.tmem.merges.counts.cleanings and place.tmem.merges.space().amplification < 1.2
    table = place.tmem.segments
    assert len(table.dictionaries()) == 2
    place.start()
    await place.verify()


async def test_a_dictionary_goes_with_its_last_segment(place: Place) -> None:
    place.store(0, 2 * SEGMENT)
    await place.recompressed()
    place.tmem.invalidate(0, SLOTS)
    place.pages.clear()
    place.recompressor._encoder = None
    place.store(0, 2 * SEGMENT)
    await place.recompressed(place.recompressor.counts.segments + 1)
    assert place.recompressor.dictionaries == 1


@pytest.mark.parametrize("on_tier", [False, True])
async def test_a_worker_that_starts_after_a_crash_finds_the_dictionaries(place: Place, on_tier: bool) -> None:
    place.store(0, 3 * SEGMENT)
    await place.recompressed()
    if on_tier:
        await place.engine.shrinker.shrink(ShrinkRequest.parse("all"))
    place.start()
    assert len(place.tmem.dictionaries) == 0
    await place.verify()
    assert len(place.tmem.dictionaries) == 1
    assert place.tmem.dictionaries.add(b"next").number == 2


async def test_a_dictionary_that_is_damaged_on_the_tier_is_an_error_and_never_a_wrong_page(place: Place) -> None:
    place.store(0, 3 * SEGMENT)
    await place.recompressed()
    await place.engine.shrinker.shrink(ShrinkRequest.parse("all"))
    place.start()
    for extent, data in list(place.tier.inner.extents.items()):
        place.tier.inner.extents[extent] = data[:50] + bytes([data[50] ^ 1]) + data[51:]
    lost = 0
    for slot, page in place.pages.items():
        try:
            assert await place.load(slot) == page
        except Corrupt:
            lost += 1
    assert lost and place.engine.reader.counts.corrupt == lost
    check(place.tmem)


async def test_a_tier_that_cannot_be_read_for_a_dictionary_is_tried_again(place: Place) -> None:
    place.store(0, 3 * SEGMENT)
    await place.recompressed()
    await place.engine.shrinker.shrink(ShrinkRequest.parse("all"))
    place.start()
    failing = iter([False, True])  # the blocks of the record come, those of the dictionary do not
    place.tier.before["read"] = lambda: place.tier.fail("read") if next(failing, False) else None
    slot = next(slot for slot in place.pages if place.tmem.slots.handles[slot] & 7 == 6)
    rest = place.engine.pager.read(slot * PAGE_BYTES, PAGE_BYTES)
    assert isinstance(rest, Deferred)
    rest.run()
    place.tier.fail()
    await place.verify()


async def test_a_record_damaged_in_ram_is_left_and_its_neighbours_are_encoded(place: Place) -> None:
    place.store(0, 4 * SEGMENT)
    place.damage_in_ram(5)
    await place.recompressed()
    assert place.tmem.merges.counts.damaged_records == 1
    del place.pages[5]
    await place.verify()


async def test_pages_that_change_while_they_are_encoded_stay_changed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.store(0, 4 * SEGMENT)

    def change() -> None:
        for slot in range(0, 100, 2):
            place.tmem.invalidate(slot, 1)
            place.pages.pop(slot, None)
        place.store(101, 1, lambda slot: page_of("text", slot))

    monkeypatch.setattr("tmemfs.jobs.throttle.Throttle.__call__", lambda throttle: change())
    await place.recompressed()
    await place.verify()


async def test_a_full_pool_is_left_to_the_shrinker(place: Place, nursery: trio.Nursery) -> None:
    place.store(0, 4 * SEGMENT)
    place.tmem.limit_pool(2 * SEGMENT_BYTES)
    place.recompressor.set_level(DEFAULT_LEVEL)
    nursery.start_soon(place.recompressor.run)
    await trio.sleep(0.1)
    assert place.recompressor.counts.segments == 0
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("text", "level"), [("off", None), ("zstd\n", DEFAULT_LEVEL), ("zstd:1", 1), ("zstd:19", 19)])
def test_the_ways_to_recompress(text: str, level: int | None) -> None:
    assert parse_recompress(text) == level


@pytest.mark.parametrize("text", ["", "on", "lz4", "zstd:0", "zstd:20", "zstd:fast", "off:1"])
def test_another_way_is_refused(text: str) -> None:
    with pytest.raises(BadValue, match=r"zstd:LEVEL|zstd:1 to zstd:19"):
        parse_recompress(text)


async def _until(condition: Callable[[], object]) -> None:
    with trio.fail_after(HANG_S):
        while not condition():
            await trio.sleep(0.005)


def test_samples_are_decoded_without_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(monkeypatch)
    place.store(0, 3 * SEGMENT)
    recompression = Recompression(place.tmem)
    recompression.look(None)
    held: list[bool] = []

    def noted(tag: int, payload: memoryview) -> bytes:
        held.append(place.tmem.lock.locked())
        return decode(tag, payload)

    monkeypatch.setattr("tmemfs.store.recompression.decode", noted)
    idle = recompression.look(None)
    assert len(recompression.samples(idle)) == SAMPLES
    assert len(held) >= SAMPLES and not any(held)


def test_samples_of_a_segment_that_goes_while_it_is_copied_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(monkeypatch)
    place.store(0, 3 * SEGMENT)
    recompression = Recompression(place.tmem)
    recompression.look(None)
    idle = recompression.look(None)
    first = idle[0]
    steps = iter(range(100))
    is_in_line = recompression._is_in_line

    def goes_soon(use: Use) -> bool:
        if use == first and next(steps) == 3:
            return False
        return is_in_line(use)

    monkeypatch.setattr(recompression, "_is_in_line", goes_soon)
    found = recompression.samples(idle)
    assert found and set(found) <= set(place.pages.values())
