"""Kernel tuning follows the active swap, not the mount; what fails is said and tried again; at the end all is restored."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from tests.settings_place import Machine
from tests.waiting import HANG_S
from tmemfs.errors import BadValue, Refused
from tmemfs.jobs import kernel_tuning as tuning
from tmemfs.jobs.kernel_tuning import KernelTuning, parse_tuning
from tmemfs.system.kernel_settings import BOOST, MINIMUM
from tmemfs.system.swap_watch import ImageSwap, SwapWatch


class TestedWatch(SwapWatch):
    """A table of swaps that the test writes."""

    __test__ = False

    def __init__(self, place: Place) -> None:
        self.place = place
        place.watches += 1

    def fileno(self) -> int:
        """Readable after a change."""
        return self.place.reader

    def clear(self) -> None:
        """Read what was told."""
        with suppress(BlockingIOError):
            os.read(self.place.reader, 100)

    def look(self) -> str | None:
        """As told."""
        if self.place.look_fails:
            raise OSError("injected")
        return self.place.device

    def open(self, device: str) -> ImageSwap:
        """One whose requests are not told."""
        return ImageSwap(device, Path("/nowhere"))

    def close(self) -> None:
        """Count."""
        self.place.watches -= 1


class Place:
    """A machine of files, and tuning on it."""

    def __init__(self, root: Path, mode: str = "auto") -> None:
        self.machine = Machine(root)
        self.reader, self.writer = os.pipe()
        self.device: str | None = None
        self.watches = 0
        os.set_blocking(self.reader, False)
        self.look_fails = False
        self.tuning = KernelTuning(self.machine.user(), lambda: TestedWatch(self), mode)

    def swap(self, device: str | None) -> None:
        """A swap over our image is on, or off."""
        self.device = device
        os.write(self.writer, b".")

    @property
    def factor(self) -> int:
        return self.machine.now(BOOST)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    with place.machine.running():
        yield place


async def test_a_mount_without_swap_changes_nothing(place: Place, nursery: trio.Nursery) -> None:
    nursery.start_soon(place.tuning.run)
    await _until(lambda: place.watches)
    place.swap(None)
    await trio.sleep(0.05)
    assert not place.tuning.is_engaged and place.factor == 15000
    assert not place.tuning.lower_minimum(1 / 2) and not place.tuning.has_requests and not place.tuning.changes()
    place.tuning.give_priority()
    assert not place.machine.directory.exists()
    nursery.cancel_scope.cancel()


async def test_settings_are_changed_while_the_swap_is_on(place: Place, nursery: trio.Nursery) -> None:
    nursery.start_soon(place.tuning.run)
    for _ in range(3):
        place.swap("loop0")
        await _until(lambda: place.tuning.is_engaged)
        assert place.factor == 0 and place.tuning.is_boost_off and place.tuning.has_requests
        assert place.tuning.lower_minimum(1 / 2) and place.machine.now(MINIMUM) == 33792
        place.swap(None)
        await _until(lambda: place.factor == 15000)
        assert not place.tuning.is_engaged and place.machine.now(MINIMUM) == 67584
    nursery.cancel_scope.cancel()


async def test_another_device_with_our_image_is_followed(place: Place, nursery: trio.Nursery) -> None:
    nursery.start_soon(place.tuning.run)
    place.swap("loop0")
    await _until(lambda: place.tuning.is_engaged)
    before = place.tuning._swap
    place.swap("loop1")
    await _until(lambda: place.tuning._swap not in (None, before))
    await _until(lambda: place.tuning.is_engaged and place.factor == 0)
    nursery.cancel_scope.cancel()


async def test_turned_off_it_restores_at_once_and_turned_on_it_changes_at_once(place: Place, nursery: trio.Nursery) -> None:
    nursery.start_soon(place.tuning.run)
    place.swap("loop0")
    await _until(lambda: place.tuning.is_engaged)
    await place.tuning.set_mode("off")
    assert not place.tuning.is_engaged and place.factor == 15000
    await place.tuning.set_mode("auto")
    assert place.tuning.is_engaged and place.factor == 0
    nursery.cancel_scope.cancel()


async def test_off_from_the_start_changes_nothing_and_restores_what_a_killed_daemon_left(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    place = Place(tmp_path, "off")
    with place.machine.running():
        killed = place.machine.user()
        killed.register()
        place.machine.kill(killed)
        place.swap("loop0")
        nursery.start_soon(place.tuning.run)
        await _until(lambda: place.factor == 15000)
        await trio.sleep(0.05)
        assert not place.tuning.is_engaged and place.factor == 15000
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("is_changing", [False, True])
async def test_at_the_end_everything_is_restored(place: Place, is_changing: bool) -> None:
    """Also where the mode is being changed just then."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(place.tuning.run)
        place.swap("loop0")
        await _until(lambda: place.tuning.is_engaged)
        place.tuning.lower_minimum(1 / 2)
        if is_changing:
            await place.tuning.set_mode("off")
            nursery.start_soon(place.tuning.set_mode, "auto")
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert (place.factor, place.machine.now(MINIMUM)) == (15000, 67584) and not place.watches
    assert not place.tuning.is_engaged


async def test_it_can_be_started_again_after_a_failure(place: Place) -> None:
    place.swap("loop0")
    for _ in range(2):
        with pytest.raises(BaseExceptionGroup):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(place.tuning.run)
                await _until(lambda: place.tuning.is_engaged)
                raise RuntimeError("injected")
        assert place.factor == 15000 and not place.watches


async def test_what_cannot_be_registered_is_logged_once_and_tried_again(
    place: Place, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tuning, "RETRY_S", 0.01)
    place.machine.directory.parent.mkdir(exist_ok=True)
    place.machine.directory.write_text("a file where the directory would be")
    place.device = "loop0"
    nursery.start_soon(place.tuning.run)
    await trio.sleep(0.1)
    assert not place.tuning.is_engaged and place.factor == 15000
    assert [record.message for record in caplog.records if "only root can write to" in record.message]
    assert len(caplog.records) == 1
    with pytest.raises(Refused):
        await place.tuning.set_mode("auto")
    place.machine.directory.unlink()
    await _until(lambda: place.tuning.is_engaged)
    nursery.cancel_scope.cancel()


async def test_a_table_that_cannot_be_read_is_tried_again(
    place: Place, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "RETRY_S", 0.01)
    place.look_fails = True
    place.device = "loop0"
    nursery.start_soon(place.tuning.run)
    await trio.sleep(0.05)
    assert not place.tuning.is_engaged
    place.look_fails = False
    await _until(lambda: place.tuning.is_engaged)
    nursery.cancel_scope.cancel()


async def test_a_mode_that_is_set_before_it_runs_is_kept(place: Place) -> None:
    await place.tuning.set_mode("off")
    assert place.tuning.mode == "off" and not place.tuning.is_engaged


def test_modes() -> None:
    assert [parse_tuning(f" {mode}\n") for mode in ("auto", "off")] == ["auto", "off"]
    with pytest.raises(BadValue, match="choose auto or off"):
        parse_tuning("on")


async def _until(condition: Callable[[], object]) -> None:
    with trio.fail_after(HANG_S):
        while not condition():
            await trio.sleep(0.005)
