"""Pressure steering a shrinker: signals in, frames out, on a machine whose memory is what the test says."""

from __future__ import annotations

import errno
import math
import threading
from collections.abc import Callable
from functools import partial
from random import Random
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import trio

from tests.parts import FaultyTier, FixedSignals, NotedTuning, Regions, new_pressure, page_of, run_jobs
from tests.waiting import HANG_S
from tmemfs.engine import Engine
from tmemfs.errors import BadValue, OutOfRange
from tmemfs.jobs import pressure
from tmemfs.jobs.pool_size import PRESSURE_FLOOR_BYTES
from tmemfs.jobs.pressure import Pressure, default_settings, parse_mode
from tmemfs.jobs.reserve import FRAME_S, SHORT_FRAME_S
from tmemfs.jobs.swap_stall import LONGEST_S, PAUSE_S, SHARES, STILL_S
from tmemfs.policy.pressure_controller import Settings
from tmemfs.store.codec import parse_codec
from tmemfs.system.pressure_signals import Memory, SignalsLost
from tmemfs.units import MIB, PAGE_BYTES, SEGMENT_BYTES

FULL = 255


class Place:
    """An engine, and the signals of its machine; the reserve is 10 MiB."""

    def __init__(self, tier: FaultyTier | None = None) -> None:
        self.tier = tier or FaultyTier()
        make_tmem = partial(Regions.new(16384, 80, 200).start, 60, 16384, spare=1)
        self.engine = Engine.over(make_tmem, self.tier, parse_codec("lz4"))
        self.signals = FixedSignals(headroom_bytes=1000 * MIB, memory_bytes=160 * MIB)
        self.tuning = NotedTuning()
        self.pressure: Pressure = new_pressure(self.engine, self.signals, self.tuning)
        self.pressure.settings = Settings(10 * MIB, 5 * MIB)
        self.tmem = self.engine.tmem

    def store(self, segments: int, first: int = 0) -> None:
        for slot in range(first, first + segments * FULL):
            assert self.engine.pager.write(slot * PAGE_BYTES, memoryview(page_of("raw", slot))) is None

    def start(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(run_jobs, self.engine)
        nursery.start_soon(self.pressure.run)

    def stand_still(self) -> None:
        """From now on the kernel has pages under write-back and memory is short, but not so that the pool is to shrink."""
        self.signals.headroom_bytes, self.signals.available_at_once, self.signals.under_write_back = 39 * MIB, 4 * MIB, 200 << 10
        self.pressure.sample_again()

    @property
    def pool_mib(self) -> int:
        return self.tmem.pool_bytes // MIB


@pytest.fixture
def place() -> Place:
    return Place()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> trio.testing.MockClock:
    """A clock that goes only when everything waits for it, however busy the machine is. For the controller alone, whose engine
    does not run: the clock does not see that a thread is at work.
    """
    monkeypatch.setattr(pressure, "time", SimpleNamespace(monotonic=trio.current_time))
    return autojump_clock


async def test_a_pool_on_a_machine_with_memory_is_left_alone(place: Place, nursery: trio.Nursery) -> None:
    place.start(nursery)
    place.store(20)
    await trio.sleep(0.1)
    assert place.pool_mib >= 20 and place.pressure.decision.ceiling == math.inf and not place.tier.inner.extents
    nursery.cancel_scope.cancel()


async def test_where_there_is_much_room_it_is_not_sampled_at_for_each_page(
    place: Place, nursery: trio.Nursery, clock: trio.testing.MockClock
) -> None:
    """Nobody can have taken it so soon; where there is little, it is sampled every 10 ms."""
    nursery.start_soon(place.pressure.run)
    samples_per_s = dict[int, float]()
    for headroom in (2000 * MIB, 30 * MIB):
        place.signals.headroom_bytes = headroom
        await trio.sleep(0.3)
        before, began = place.pressure.counts.samples, trio.current_time()
        while trio.current_time() - began < 0.6:
            place.pressure.sample_again()
            await trio.sleep(0.005)
        samples_per_s[headroom] = (place.pressure.counts.samples - before) / (trio.current_time() - began)
    assert samples_per_s[2000 * MIB] < 7 and samples_per_s[30 * MIB] > 14, samples_per_s
    nursery.cancel_scope.cancel()


async def test_a_pool_that_memory_is_short_of_shrinks_until_there_is_enough(place: Place, nursery: trio.Nursery) -> None:
    place.start(nursery)
    place.store(40)
    await _until(lambda: place.pool_mib >= 40)
    held = place.pool_mib
    place.signals.headroom_bytes = 5 * MIB
    place.pressure.sample_again()
    await _until(lambda: place.pool_mib < held - 10)
    await _until(lambda: place.pressure.counts.first_release_us)
    assert place.pressure.counts.shrinks >= 1
    place.signals.headroom_bytes = 15 * MIB
    await _until(lambda: place.pressure.decision.demand < MIB)
    await _keeps(place, 10)
    assert place.pressure.decision.state == "holding" and place.pool_mib > 4
    nursery.cancel_scope.cancel()


async def test_what_is_stored_while_memory_is_short_leaves_again(place: Place, nursery: trio.Nursery) -> None:
    place.start(nursery)
    place.store(10)
    place.signals.headroom_bytes = 15 * MIB
    await _until(lambda: place.pressure.decision.state == "holding")
    held = max(place.pool_mib, PRESSURE_FLOOR_BYTES // MIB)  # the pool may be below what it is allowed already
    for slot in range(10 * FULL, 30 * FULL):
        if waiting := place.engine.pager.write(slot * PAGE_BYTES, memoryview(page_of("raw", slot))):
            await trio.to_thread.run_sync(waiting.run)
    await _until(lambda: place.pool_mib <= held + 2)
    assert len(place.tier.inner.extents) >= 18
    nursery.cancel_scope.cancel()


async def test_a_stall_shrinks_where_memory_is_short(place: Place, nursery: trio.Nursery) -> None:
    place.start(nursery)
    place.store(20)
    place.signals.headroom_bytes, place.signals.stalled_total_us = 15 * MIB, 60_000_000
    place.pressure.sample_again()
    await _until(lambda: place.tier.inner.extents)
    assert place.pressure.counts.stalls == 1
    nursery.cancel_scope.cancel()


async def test_in_critical_shortage_no_store_takes_memory_that_was_not_given_back(place: Place, nursery: trio.Nursery) -> None:
    place.store(20)
    place.signals.headroom_bytes = MIB
    place.tier.fail("write")
    place.start(nursery)
    await _until(lambda: place.pressure.decision.state == "critical")
    assert place.tmem.arena.limit * SEGMENT_BYTES == place.tmem.pool_bytes and place.pressure.counts.strict == 1
    assert place.engine.reserve.frame_s == SHORT_FRAME_S
    place.signals.headroom_bytes = 1000 * MIB
    place.tier.fail()
    await _until(lambda: place.pressure.decision.state == "relaxed")
    assert place.tmem.arena.limit == 60
    nursery.cancel_scope.cancel()


async def test_the_pool_grows_back_also_while_nothing_moves(
    place: Place, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pressure, "IDLE_S", 0.02)
    monkeypatch.setattr(pressure, "WORKERS_KEPT_S", 0)
    place.pressure.settings = Settings(10 * MIB, 100 * MIB)
    place.store(20)
    place.start(nursery)
    place.signals.headroom_bytes = 15 * MIB
    place.pressure.sample_again()
    await _until(lambda: place.pressure.decision.ceiling < 25 * MIB)
    place.signals.headroom_bytes = 1000 * MIB
    place.pressure.sample_again()
    await _until(lambda: place.pressure.decision.ceiling == math.inf)
    samples = place.pressure.counts.samples
    await trio.sleep(0.2)
    assert place.pressure.counts.samples <= samples + 1
    nursery.cancel_scope.cancel()


async def test_what_is_loaded_again_at_once_keeps_the_next_step_small(place: Place) -> None:
    """In the units in which the store and the shrinker count."""
    place.store(40)
    place.signals.headroom_bytes = 6 * MIB
    steps = []
    for refaults in (0, 900, 0):
        place.engine.shrinker.counts.pages += 1000
        place.tmem.counts.loads_disk += refaults
        place.pressure._take_sample()
        steps.append(place.pressure.decision.step)
    assert steps[0] == steps[1] < steps[2]


async def test_the_kernels_workers_have_priority_while_memory_is_short(
    place: Place, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(pressure, "WORKERS_KEPT_S", 0.3)
    monkeypatch.setattr(pressure, "WORKERS_S", 0.5)
    nursery.start_soon(place.pressure.run)
    place.store(1)
    await trio.sleep(0.05)
    assert not place.tuning.have_priority
    place.signals.headroom_bytes = 15 * MIB
    place.pressure.sample_again()
    await _until(lambda: place.tuning.have_priority)
    place.signals.headroom_bytes = 1000 * MIB
    ended = trio.current_time()
    place.pressure.sample_again()
    await _until(lambda: not place.tuning.have_priority)
    assert trio.current_time() - ended > 0.2  # memory may be short again at once
    assert place.engine.reserve.frame_s == FRAME_S
    place.signals.headroom_bytes = 15 * MIB
    place.pressure.sample_again()
    with trio.fail_after(0.25):  # at once, however short the pause was
        while not place.tuning.have_priority:
            await trio.sleep(0.005)
    nursery.cancel_scope.cancel()


async def test_the_kernels_workers_have_priority_where_all_that_is_left_would_have_to_be_swapped_out(
    place: Place, nursery: trio.Nursery
) -> None:
    """A guest hung in this state: its pool was relaxed, because half of what can be swapped out counts as headroom."""
    place.start(nursery)
    place.signals.headroom_bytes, place.signals.available_at_once = 39 * MIB, 5 * MIB
    place.store(1)
    await _until(lambda: place.tuning.have_priority)
    assert place.pressure.decision.state == "relaxed"
    nursery.cancel_scope.cancel()


async def test_the_watermark_is_lowered_while_swap_writes_do_not_reach_us(
    place: Place, nursery: trio.Nursery, clock: trio.testing.MockClock
) -> None:
    """A guest hung in this state: the kernel worker that held our write waited for a page, without priority when it began to."""
    nursery.start_soon(place.pressure.run)
    place.store(1)
    place.stand_still()
    await _until(lambda: place.tuning.shares == [*SHARES])
    await trio.sleep(2 * STILL_S)
    assert place.tuning.shares == [*SHARES] and place.pressure.swap_stall.count == 1
    place.store(1)
    await _until(lambda: place.tuning.shares == [*SHARES, 1])
    await _until(lambda: place.tuning.shares == [*SHARES, 1, *SHARES])  # and once more
    place.signals.under_write_back = 0
    await _until(lambda: place.tuning.shares == [*SHARES, 1, *SHARES, 1])
    assert place.pressure.swap_stall.count == 2
    nursery.cancel_scope.cancel()


SHORT = Memory(headroom=39 * MIB, available=4 * MIB, under_write_back=200 << 10)


@pytest.mark.parametrize("engaged", [True, False])
def test_an_idle_mount_or_one_without_swap_lowers_nothing_for_what_stands_still_elsewhere(place: Place, engaged: bool) -> None:
    """Six mounts did under one burst of pressure, though only one had anything to do."""
    place.store(1)
    place.tuning.requests, place.tuning.engaged = not engaged, engaged
    place.pressure.swap_stall.sample(0.0, SHORT._replace(under_write_back=0), 10 * MIB)
    for sample in range(1, 40):
        place.pressure.swap_stall.sample(10 + sample * STILL_S / 2, SHORT, 10 * MIB)
    assert not place.tuning.shares and not place.pressure.swap_stall.count and not place.pressure.swap_stall.is_suspected


def test_what_another_daemon_restored_is_lowered_again_while_swap_writes_do_not_reach_us(place: Place) -> None:
    place.store(1)
    for sample in range(4):
        place.pressure.swap_stall.sample(sample * STILL_S, SHORT, 10 * MIB)
    assert place.tuning.shares == [*SHARES]
    place.tuning.shares.append(1)
    place.pressure.swap_stall.sample(4 * STILL_S, SHORT, 10 * MIB)
    assert place.tuning.shares == [*SHARES, 1, SHARES[-1]] and place.pressure.swap_stall.count == 1


async def test_the_kernels_workers_of_an_idle_machine_are_left_alone_where_no_swap_is_on(
    place: Place, nursery: trio.Nursery
) -> None:
    place.tuning.engaged = False
    place.start(nursery)
    place.signals.headroom_bytes = 5 * MIB
    place.pressure.sample_again()
    await _until(lambda: place.pressure.decision.state == "shrinking")
    await trio.sleep(0.15)
    assert not place.tuning.have_priority
    nursery.cancel_scope.cancel()


async def test_near_the_border_of_two_states_the_log_is_quiet(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """A line for each change every 10 to 30 ms filled the log; samples of 20 s are played here."""
    caplog.set_level("INFO")
    clock, lines = 0.0, Random(1)
    with patch("time.monotonic", lambda: clock):
        for _ in range(1000):
            clock += 0.02
            place.signals.headroom_bytes = lines.choice((18, 19, 21, 22)) * MIB
            place.pressure._take_sample()
    assert len([record for record in caplog.records if "memory is" in record.message]) <= 2


async def test_a_change_that_lasted_is_logged_once_and_one_that_did_not_is_counted(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    clock = 0.0
    with patch("time.monotonic", lambda: clock):
        for seconds, headroom in ((1, 1000), (0.5, 15), (2, 1000), (3, 15), (3, 1000)):
            for _ in range(int(seconds / 0.01)):
                clock += 0.01
                place.signals.headroom_bytes = headroom * MIB
                place.pressure._take_sample()
    said = [record.message for record in caplog.records if "memory is" in record.message]
    assert said == ["memory is holding, 15 MiB of headroom", "memory is relaxed, 1000 MiB of headroom"]
    assert place.pressure.counts.strict == 2


async def test_a_change_is_logged_though_nothing_moves_any_more(
    place: Place, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for name in ("LASTED_S", "QUIET_S", "IDLE_S"):
        monkeypatch.setattr(pressure, name, 0.05)
    place.start(nursery)
    place.signals.headroom_bytes = 15 * MIB
    place.pressure.sample_again()
    await _until(lambda: "memory is holding, 15 MiB of headroom" in caplog.messages)
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("why", ["nothing is written", "stores go on", "loads go on", "memory is to be had"])
def test_the_watermark_is_left_alone_where_nothing_stands_still(place: Place, why: str) -> None:
    place.store(3)
    memory = {
        "nothing is written": SHORT._replace(under_write_back=0),
        "memory is to be had": SHORT._replace(available=6 * MIB),
    }.get(why, SHORT)
    for sample in range(20):
        place.pressure.swap_stall.sample(sample * STILL_S / 2, memory, 10 * MIB)
        if why == "stores go on":
            assert place.engine.pager.write(0, memoryview(page_of("half", 1))) is None
        elif why == "loads go on":
            assert place.tmem.load(0)
    assert not place.tuning.shares and not place.pressure.swap_stall.count


def test_what_lowering_does_not_help_is_left_alone_for_a_while(place: Place) -> None:
    """Files under write-back that hang while memory is short: nothing is swapped, and nothing stands still."""
    stall, step = place.pressure.swap_stall, STILL_S / 4
    for sample in range(int((LONGEST_S + PAUSE_S) / step)):
        stall.sample(sample * step, SHORT, 10 * MIB)
    assert place.tuning.shares == [*SHARES, 1] and stall.count == 1 and stall.is_suspected
    for sample in range(int((LONGEST_S + PAUSE_S) / step), int((2 * LONGEST_S + PAUSE_S - STILL_S) / step)):
        stall.sample(sample * step, SHORT, 10 * MIB)
    assert place.tuning.shares == [*SHARES, 1, *SHARES] and stall.count == 2


def test_a_watermark_that_may_not_be_lowered_is_not_counted(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    stall = place.pressure.swap_stall
    place.tuning.may_lower = False
    for sample in range(20):
        stall.sample(sample * STILL_S / 2, SHORT, 10 * MIB)
    stall.end()
    assert not stall.count and not caplog.records


@pytest.mark.parametrize("ended_by", ["another mode", "the end of the daemon"])
async def test_the_watermark_is_as_it_was_after(place: Place, ended_by: str) -> None:
    async with trio.open_nursery() as nursery:
        place.start(nursery)
        place.stand_still()
        await _until(lambda: place.tuning.shares == [SHARES[0]])
        if ended_by == "another mode":
            place.pressure.set_mode("manual")
            assert place.tuning.shares == [SHARES[0], 1]
        nursery.cancel_scope.cancel()
    assert place.tuning.shares == [SHARES[0], 1]


@pytest.mark.parametrize("ended_by", ["another mode", "the end of the daemon"])
async def test_the_kernels_workers_do_not_keep_their_priority(place: Place, ended_by: str) -> None:
    place.signals.headroom_bytes = 15 * MIB
    async with trio.open_nursery() as nursery:
        place.start(nursery)
        await _until(lambda: place.tuning.have_priority)
        if ended_by == "another mode":
            place.pressure.set_mode("manual")
            assert not place.tuning.have_priority
        nursery.cancel_scope.cancel()
    assert not place.tuning.have_priority


@pytest.mark.parametrize("mode", ["manual", "off"])
async def test_only_auto_acts(place: Place, nursery: trio.Nursery, mode: str) -> None:
    place.pressure.set_mode(mode)
    place.start(nursery)
    place.store(20)
    place.signals.headroom_bytes = MIB
    place.pressure.sample_again()
    await trio.sleep(0.1)
    assert place.pool_mib >= 20 and not place.tier.inner.extents and place.tmem.arena.limit == 60
    assert place.pressure.decision.state == ("critical" if mode == "manual" else "relaxed")
    nursery.cancel_scope.cancel()


async def test_a_mode_other_than_auto_lifts_what_the_controller_had_asked(place: Place, nursery: trio.Nursery) -> None:
    place.start(nursery)
    place.store(20)
    place.signals.headroom_bytes = MIB
    place.pressure.sample_again()
    await _until(lambda: place.pressure.decision.state == "critical")
    place.pressure.set_mode("manual")
    assert place.engine.pool_size.ceiling == math.inf and place.tmem.arena.limit == 60
    nursery.cancel_scope.cancel()


async def test_it_looks_only_while_something_moves(place: Place, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmemfs.jobs.pressure.QUIET_S", 0.05)
    place.signals.headroom_bytes = 15 * MIB
    place.start(nursery)
    place.store(20)
    samples = -2
    with trio.fail_after(HANG_S):
        while place.pressure.counts.samples - samples > 1:
            samples = place.pressure.counts.samples
            await trio.sleep(0.5)
    place.store(1, 20 * FULL)
    await _until(lambda: place.pressure.counts.samples > samples + 3)
    nursery.cancel_scope.cancel()


async def test_a_tier_that_fails_under_pressure_loses_nothing(place: Place, nursery: trio.Nursery) -> None:
    place.tier.fail("write")
    place.start(nursery)
    place.store(20)
    place.signals.headroom_bytes = 5 * MIB
    place.pressure.sample_again()
    await _until(lambda: place.engine.free_frames.stuck)
    assert place.pool_mib >= 20 and place.engine.shrinker.counts.write_errors
    place.tier.fail()
    await _until(lambda: place.pool_mib < 15)
    for slot in range(0, 20 * FULL, 97):
        page = place.engine.pager.read(slot * PAGE_BYTES, PAGE_BYTES)
        loaded = page if isinstance(page, bytes) else await trio.to_thread.run_sync(page.run)
        assert loaded == page_of("raw", slot)
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("fails", ["at once", "never ends"])
async def test_stores_go_on_when_the_system_has_no_memory_at_all(
    place: Place, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    frames, ended = iter(range(4)), threading.Event()

    def populate(*arguments: object) -> None:
        if next(frames, None) is None:
            if fails == "never ends":
                ended.wait(HANG_S)
            raise OSError(errno.ENOMEM, "injected")

    monkeypatch.setattr("tmemfs.jobs.reserve.populate", populate)
    place.start(nursery)
    await _until(lambda: not place.tmem.arena.takes_cold and place.tmem.arena.has_free_frame)
    for slot in range(12 * FULL):
        if waiting := place.engine.pager.write(slot * PAGE_BYTES, memoryview(page_of("raw" if slot % 2 else "half", slot))):
            with trio.fail_after(HANG_S):
                await trio.to_thread.run_sync(waiting.run)
    assert place.pool_mib <= 5 and len(place.tier.inner.extents) >= 6 and not place.engine.pager.refused
    ended.set()
    nursery.cancel_scope.cancel()


def test_the_reserve_is_a_sixteenth_within_bounds() -> None:
    sizes = [default_settings(memory * MIB, 60 * MIB).reserve_bytes // MIB for memory in (64, 512, 4096, 64 << 10)]
    assert sizes == [16, 32, 256, 512]
    assert default_settings(MIB, 600 * MIB).growth_bytes == 10 * MIB


@pytest.mark.parametrize("reserve", [0, -1, 81 * MIB])
def test_a_reserve_that_cannot_be_is_refused(place: Place, reserve: int) -> None:
    with pytest.raises(OutOfRange, match="half of the memory"):
        place.pressure.set_reserve(reserve)


def test_a_growth_of_nothing_is_refused(place: Place) -> None:
    with pytest.raises(OutOfRange, match="small for ever"):
        place.pressure.set_growth(0)


def test_modes() -> None:
    assert [parse_mode(f" {mode}\n") for mode in ("auto", "manual", "off")] == ["auto", "manual", "off"]
    with pytest.raises(BadValue, match="choose auto, manual, off"):
        parse_mode("on")


async def _until(condition: Callable[[], object]) -> None:
    with trio.fail_after(HANG_S):
        while not condition():
            await trio.sleep(0.005)


async def _keeps(place: Place, samples: int) -> None:
    """Wait until the pool has kept its size for so many samples."""
    size, since = -1, 0
    while place.pressure.counts.samples - since < samples:
        if place.pool_mib != size:
            size, since = place.pool_mib, place.pressure.counts.samples
        place.pressure.sample_again()
        await trio.sleep(0.005)


class LostSignals(FixedSignals):
    """Signals whose cgroup was removed."""

    is_open = True

    def memory(self) -> Memory:
        """As the kernel says it."""
        raise SignalsLost("No such device")

    def close(self) -> None:
        """Noted."""
        self.is_open = False


async def test_signals_that_are_lost_are_opened_again(place: Place, nursery: trio.Nursery) -> None:
    place.start(nursery)
    await _until(lambda: place.pressure.counts.samples)
    lost, samples = LostSignals(), place.pressure.counts.samples
    place.pressure.signals = lost
    place.pressure.sample_again()
    await _until(lambda: place.pressure.signals is place.signals and place.pressure.counts.samples > samples)
    assert not lost.is_open
    nursery.cancel_scope.cancel()


async def test_signals_that_are_lost_at_once_are_left_to_the_supervisor(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened again and again without a pause, they would keep the event loop from everything else."""
    opened: list[LostSignals] = []

    def open_lost() -> LostSignals:
        opened.append(LostSignals())
        return opened[-1]

    monkeypatch.setattr(place.pressure, "_open_signals", open_lost)
    place.pressure.signals = LostSignals()
    with pytest.raises((SignalsLost, ExceptionGroup)):
        await place.pressure.run()
    assert len(opened) == 2
