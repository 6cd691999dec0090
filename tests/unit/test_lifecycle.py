"""Which mount a path means and which loop devices are its own, by tables made here: nothing is mounted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tmemfs.cli import lifecycle, targets
from tmemfs.cli.targets import Target
from tmemfs.errors import Busy, Refused
from tmemfs.system import own_mount, runtime, swapdev
from tmemfs.system.proctext import Mount
from tmemfs.system.runtime import MountRecord
from tmemfs.system.swapdev import FileId, Loop

PLACE = Path("/mnt/one")
OURS, OTHERS = 40, 41


class Machine:
    """What the kernel says: mounts, loop devices and the files behind them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mounts: list[Mount] = []
        self.loops: list[Loop] = []
        self.behind: dict[str, FileId] = {}
        monkeypatch.setattr(swapdev, "mounts", lambda *_: self.mounts)
        monkeypatch.setattr(swapdev, "loop_devices", lambda: self.loops)
        monkeypatch.setattr(swapdev, "file_behind", self.behind.get)
        monkeypatch.setattr(swapdev, "swap_entries", list)

    def mount(self, place: Path, device: int, kind: str = targets.FS_TYPE) -> None:
        self.mounts.append(Mount(device, "/", str(place), kind, ()))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(runtime, "DIRECTORY", tmp_path / "tmemfs.d")
    return Machine(monkeypatch)


def record(place: Path = PLACE, device: int = OURS, lives: bool = True) -> MountRecord:
    started = runtime.process_started(os.getpid())
    assert started is not None
    return MountRecord(str(place), os.getpid(), started if lives else started - 1, runtime.boot_id(), device, "0.1.0")


def devices(target: Target) -> list[str]:
    return [loop.device for loop in target.loops()]


def test_the_file_behind_a_loop_device_decides_while_the_daemon_lives(machine: Machine) -> None:
    machine.mount(PLACE, OURS)
    machine.loops = [Loop("/dev/loop0", 1, "/mnt/one/swap"), Loop("/dev/loop1", 2, "/swap"), Loop("/dev/loop2", 3, "/mnt/one/swap")]
    machine.behind |= {"/dev/loop0": FileId(OTHERS, 2), "/dev/loop1": FileId(OURS, 2), "/dev/loop2": FileId(OURS, 7)}
    # the first is at the same path in another namespace, the second was detached from its path, the third is another file
    assert devices(targets.find(PLACE)) == ["/dev/loop1"]


def test_the_path_decides_where_no_daemon_answers(machine: Machine) -> None:
    machine.loops = [Loop("/dev/loop0", 1, "/mnt/one/swap"), Loop("/dev/loop1", 2, "/mnt/two/swap"), Loop("/dev/loop2", 3, "/swap")]
    assert devices(targets.find(PLACE)) == ["/dev/loop0"]


def test_the_record_decides_where_the_path_is_lost(machine: Machine) -> None:
    runtime.write_record(record(lives=False).with_loop("/dev/loop1", 7))
    machine.loops = [Loop("/dev/loop0", 7, "/swap"), Loop("/dev/loop1", 7, "/swap")]
    target = targets.find(PLACE)
    assert devices(target) == ["/dev/loop1"] and target.is_dead and target.is_nothing
    machine.loops = [Loop("/dev/loop1", 8, "/swap")]  # attached to something else since
    assert devices(targets.find(PLACE)) == []


def test_nothing_is_asked_about_what_cannot_be_ours(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.mount(PLACE, OURS)
    machine.loops = [Loop("/dev/loop0", 1, "/srv/disk.img")]

    def asked(device: str) -> FileId:
        raise AssertionError(device)

    monkeypatch.setattr(swapdev, "file_behind", asked)
    assert devices(targets.find(PLACE)) == []


def test_a_bind_mount_is_the_mount_that_is_recorded(machine: Machine) -> None:
    machine.mount(Path("/mnt/bound"), OURS)
    machine.mount(PLACE, OURS)
    runtime.write_record(record())
    for place in (PLACE, Path("/mnt/bound")):
        target = targets.find(place)
        assert target.mountpoint == PLACE and set(target.places) == {PLACE, Path("/mnt/bound")}
        assert target.daemon == os.getpid() and not target.is_dead


def test_a_mount_without_a_record_is_called_by_its_first_place(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapdev, "mount_is_dead", lambda _: False)
    machine.mount(PLACE, OURS)
    machine.mount(Path("/mnt/bound"), OURS)
    target = targets.find(Path("/mnt/bound"))
    assert (target.mountpoint, target.record, target.daemon, target.is_dead) == (PLACE, None, None, False)


def test_a_record_of_a_daemon_that_lives_counts_more_than_one_with_the_same_device_number(machine: Machine) -> None:
    runtime.write_record(record(Path("/mnt/a"), lives=False))
    runtime.write_record(record(Path("/mnt/b")))
    runtime.write_record(record(Path("/mnt/c"), lives=False))
    machine.mount(Path("/mnt/b"), OURS)
    assert targets.find(Path("/mnt/b")).mountpoint == Path("/mnt/b")


def test_a_foreign_mount_is_never_ours(machine: Machine) -> None:
    machine.mount(PLACE, OURS)
    machine.mount(PLACE, OTHERS, "tmpfs")
    runtime.write_record(record())
    target = targets.find(PLACE)
    assert target.is_nothing
    for work in (lifecycle.umount, lifecycle.refuse_taken, lambda target: lifecycle.down(target, True, lambda *_: None)):
        with pytest.raises(Refused, match="taken by a tmpfs mount that is not ours"):
            work(target)


def test_a_place_below_another_mount_stops_down_before_anything_is_changed(machine: Machine) -> None:
    machine.mount(PLACE, OURS)
    machine.mount(Path("/mnt/bound"), OURS)
    machine.mount(Path("/mnt/bound"), OTHERS, "tmpfs")
    runtime.write_record(record())
    machine.loops = [Loop("/dev/loop0", 1, "/mnt/one/swap")]
    machine.behind["/dev/loop0"] = FileId(OURS, 2)
    with pytest.raises(Busy, match="a tmpfs mount lies over /mnt/bound: unmount that first"):
        lifecycle.down(targets.find(PLACE), True, lambda *_: None)


def test_a_mount_that_is_nowhere_here_is_not_mounted_again(machine: Machine) -> None:
    runtime.write_record(record())
    with pytest.raises(Busy, match=f"is not mounted here, but its daemon .process {os.getpid()}. lives: run 'tmemfs down"):
        lifecycle.refuse_taken(targets.find(PLACE))


def test_records_of_nothing_are_dropped_under_the_lock(machine: Machine) -> None:
    for name in ("a", "b"):
        runtime.write_record(record(Path(f"/mnt/{name}"), lives=False))
    runtime.write_record(record(Path("/mnt/lives")))
    assert targets.find(Path("/mnt/a")).record is None
    assert len(runtime.read_records()) == 3  # who only looks changes nothing
    with targets.of(Path("/mnt/a"), "down") as target:
        assert target.record is None
        assert [kept.mountpoint for kept in runtime.read_records()] == ["/mnt/lives"]


def test_the_lock_is_that_of_the_mount_whatever_it_is_called(machine: Machine) -> None:
    machine.mount(PLACE, OURS)
    machine.mount(Path("/mnt/bound"), OURS)
    runtime.write_record(record())
    with targets.of(Path("/mnt/bound"), "up"):
        assert (runtime.DIRECTORY / runtime.lock_of(PLACE)).exists()


def test_a_daemon_whose_mount_was_detached_knows_what_uses_its_image(machine: Machine) -> None:
    runtime.write_record(record().with_loop("/dev/loop1", 7))
    machine.loops = [Loop("/dev/loop0", 6, "/swap"), Loop("/dev/loop1", 7, "/swap"), Loop("/dev/loop2", 8, "/mnt/one/swap")]
    assert own_mount.loops_of_own(PLACE, os.getpid()) == ["/dev/loop1", "/dev/loop2"]
    runtime.write_record(record(lives=False).with_loop("/dev/loop1", 7))
    assert own_mount.loops_of_own(PLACE, os.getpid()) == ["/dev/loop2"]


@pytest.mark.parametrize(("device", "kind"), [(OTHERS, "tmpfs"), (OTHERS, targets.FS_TYPE), (None, "")])
def test_a_daemon_unmounts_nothing_that_is_not_its_own(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, device: int | None, kind: str
) -> None:
    unmounted: list[Path] = []
    monkeypatch.setattr(swapdev, "unmount", unmounted.append)
    runtime.write_record(record())
    if device is not None:
        machine.mount(PLACE, device, kind)
    with pytest.raises(OSError, match="not mounted there any more"):
        own_mount.unmount_own(PLACE, os.getpid())
    machine.mount(PLACE, OURS)
    own_mount.unmount_own(PLACE, os.getpid())
    assert unmounted == [PLACE]


def test_a_device_number_that_a_living_daemon_has_now_keeps_no_record_of_a_dead_one(machine: Machine) -> None:
    other = Path("/mnt/two")
    runtime.runtime_directory()
    runtime.write_record(record(lives=False))
    runtime.write_record(record(other))
    machine.mount(other, OURS)  # the number was free again
    with targets.of(other, "up") as target:
        assert target.record is not None and target.record.daemon_lives
    assert runtime.read_record(PLACE) is None and runtime.read_record(other) is not None
    runtime.write_record(record(lives=False))
    machine.mounts.clear()
    machine.mount(PLACE, OURS)
    runtime.remove_record(other)
    with targets.of(other, "up"):
        assert runtime.read_record(PLACE) is not None  # here the mount is what the dead one left
