"""The check that nothing is left: it finds each kind of thing of a run, and nothing of another run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools.leftovers import SETTINGS, Machine

SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine on which nothing is, with a run below /runs/mine."""
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    for directory in (proc / "self", proc / "sys/vm", sys / "block", sys / "fs/cgroup/memory"):
        directory.mkdir(parents=True)
    (proc / "swaps").write_text(SWAPS)
    (proc / "self/mounts").write_text("proc /proc proc rw 0 0\n")
    for name in SETTINGS:
        (proc / "sys" / name).write_text("15000\n")
    return Machine(Path("/runs/mine"), 77, proc, sys)


def attach(machine: Machine, number: int, file: bytes) -> None:
    place = machine.sys / f"block/loop{number}/loop"
    place.mkdir(parents=True)
    (place / "backing_file").write_bytes(file + b"\n")


def mount(machine: Machine, place: str) -> None:
    with (machine.proc / "self/mounts").open("a") as table:
        table.write(f"tmemfs {place} fuse.tmemfs rw 0 0\n")


def run(machine: Machine, pid: int, *words: bytes) -> None:
    (machine.proc / str(pid)).mkdir()
    (machine.proc / str(pid) / "cmdline").write_bytes(b"".join(word + b"\0" for word in words))


def test_on_a_machine_as_it_was_nothing_is_left(machine: Machine) -> None:
    assert not machine.left(machine.settings())


def test_a_loop_device_over_an_image_is_left_also_after_the_mount_has_gone(machine: Machine) -> None:
    attach(machine, 3, b"/runs/mine/mnt/swap (deleted)")
    (machine.proc / "swaps").write_text(SWAPS + "/dev/loop3 partition 4194300 0 100\n/dev/sda2 partition 99 0 -2\n")
    assert machine.left(machine.settings()) == [
        "swap /dev/loop3 is on",
        "loop device /dev/loop3 is attached to /runs/mine/mnt/swap",
    ]


def test_a_swap_file_of_its_own_is_left(machine: Machine) -> None:
    (machine.proc / "swaps").write_text(SWAPS + "/runs/mine/a\\040file file 4194300 0 100\n")
    assert machine.left(machine.settings()) == ["swap /runs/mine/a file is on"]


def test_a_mount_a_cgroup_and_a_process_are_left(machine: Machine) -> None:
    mount(machine, "/runs/mine/mn\\040t")
    (machine.sys / "fs/cgroup/memory/tmemfs-hog-77").mkdir()
    run(machine, 1234, b"python", b"-m", b"tmemfs", b"--log", b"/runs/mine/log")
    run(machine, 1235, b"fio", b"--directory=/runs/mine")
    assert machine.left(machine.settings()) == [
        "/runs/mine/mn t is mounted",
        f"cgroup {machine.sys}/fs/cgroup/memory/tmemfs-hog-77 is there",
        "process 1234 runs: python -m tmemfs --log /runs/mine/log",
        "process 1235 runs: fio --directory=/runs/mine",
    ]


def test_what_another_run_has_is_not_ours(machine: Machine) -> None:
    attach(machine, 3, b"/runs/mine-too/mnt/swap")
    mount(machine, "/runs/minelike")
    (machine.sys / "fs/cgroup/memory/tmemfs-hog-78").mkdir()
    run(machine, 1234, b"tmemfs", b"/runs/other/log")
    run(machine, 1235, b"pytest", b"--basetemp=/runs/mine2")
    run(machine, os.getpid(), b"pytest", b"/runs/mine")
    assert not machine.left(machine.settings())


def test_a_setting_that_is_not_as_it_was_is_left_changed(machine: Machine) -> None:
    before = machine.settings()
    (machine.proc / "sys/vm/min_free_kbytes").write_text("7500\n")
    assert machine.left(before) == ["vm/min_free_kbytes is 7500 and was 15000"]


def test_settings_are_not_compared_while_another_tmemfs_is_mounted(machine: Machine) -> None:
    before = machine.settings()
    (machine.proc / "sys/vm/min_free_kbytes").write_text("7500\n")
    mount(machine, "/runs/other/mnt")
    assert not machine.left(before)


def test_names_that_are_not_utf_8_are_shown(machine: Machine) -> None:
    attach(machine, 3, b"/runs/mine/\xff\xe2\x80\xa8/swap")
    assert machine.left(machine.settings()) == [r"loop device /dev/loop3 is attached to /runs/mine/\udcff\u2028/swap"]


def test_what_ends_meanwhile_is_not_left(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    mount(machine, "/runs/mine/mnt")
    table = machine.proc / "self/mounts"
    monkeypatch.setattr("time.sleep", lambda _: table.write_text(""))
    assert not machine.wait(machine.settings(), 60)
    mount(machine, "/runs/mine/mnt")
    assert machine.wait(machine.settings(), 0) == ["/runs/mine/mnt is mounted"]
