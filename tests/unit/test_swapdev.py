"""Loop devices, swaps and mounts, read from tables made here; and the programs that are run, in front of which stand our own."""

from __future__ import annotations

import errno
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from tmemfs.errors import Refused
from tmemfs.system import swapdev
from tmemfs.system.in_time import in_time
from tmemfs.system.proctext import SwapEntry
from tmemfs.system.swapdev import Loop
from tmemfs.units import GIB, MIB

SWAPS = """\
Filename				Type		Size		Used		Priority
/dev/sda2                               partition	1048572		2048		-2
/dev/loop3                              partition	8388604		0		100
/swap\\040file                           file		1024		1024		5
"""
MOUNTS = """\
22 27 0:21 / /proc rw,nosuid - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/sda1 rw
40 27 0:40 / /run/tmemfs rw,nosuid,nodev shared:12 - fuse.tmemfs tmemfs rw,user_id=0
41 27 0:41 / /mnt/with\\040space rw - tmpfs tmpfs rw
42 27 0:42 / /mnt/twice rw - tmpfs tmpfs rw
43 42 0:43 / /mnt/twice rw shared:3 master:1 - fuse.tmemfs tmemfs rw
44 27 0:44 / /mnt/back\\134slash rw - tmpfs tmpfs rw
"""


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    table = tmp_path / "mounts"
    table.write_text(MOUNTS)
    return table


@pytest.fixture
def swaps(tmp_path: Path) -> Path:
    table = tmp_path / "swaps"
    table.write_text(SWAPS)
    return table


def attach(sys_block: Path, device: str, backing: str) -> None:
    """A loop device in /sys, attached to `backing`."""
    loop = sys_block / device / "loop"
    loop.mkdir(parents=True)
    (loop / "backing_file").write_text(f"{backing}\n")


def program(directory: Path, name: str, exit_code: int = 0, out: str = "", err: str = "") -> None:
    """A program that keeps its arguments and says `out` and `err`."""
    path = directory / name
    path.write_text(f'#!/bin/sh\necho "$0 $*" >> {directory}/calls\nprintf "{out}"\nprintf "{err}" >&2\nexit {exit_code}\n')
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory programs are found in."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", os.fspath(directory))
    return directory


def calls(programs: Path) -> list[str]:
    return [line.removeprefix(f"{programs}/") for line in (programs / "calls").read_text().splitlines()]


def test_swaps_are_read_with_their_sizes_in_bytes(swaps: Path) -> None:
    assert swapdev.swap_entries(swaps) == [
        SwapEntry("/dev/sda2", 1048572 << 10, 2 * MIB, -2),
        SwapEntry("/dev/loop3", 8388604 << 10, 0, 100),
        SwapEntry("/swap file", MIB, MIB, 5),
    ]


def test_no_swap_is_an_empty_list(tmp_path: Path) -> None:
    (tmp_path / "swaps").write_text(SWAPS.splitlines(keepends=True)[0])
    assert swapdev.swap_entries(tmp_path / "swaps") == []


def test_a_swap_is_found_by_its_device(swaps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = swapdev.swap_entries(swaps)
    monkeypatch.setattr(swapdev, "swap_entries", lambda: found)
    assert swapdev.swap_on_device("/dev/loop3") == found[1]
    assert swapdev.swap_on_device("/dev/loop") is None


def test_loop_devices_are_found_by_what_they_are_attached_to(tmp_path: Path) -> None:
    attach(tmp_path, "loop0", "/run/tmemfs/swap")
    attach(tmp_path, "loop1", "/run/tmemfs/swap2")
    attach(tmp_path, "loop12", "/run/tmemfs/swap")
    (tmp_path / "loop2").mkdir()  # attached to nothing
    (tmp_path / "sda").mkdir()
    assert swapdev.loop_devices_of(Path("/run/tmemfs/swap"), tmp_path) == ["/dev/loop0", "/dev/loop12"]
    assert swapdev.loop_devices_of(Path("/run/tmemfs/other"), tmp_path) == []


def test_a_loop_device_is_found_when_its_mount_is_gone(tmp_path: Path) -> None:
    attach(tmp_path, "loop7", "/run/tmemfs/swap (deleted)")
    assert swapdev.loop_devices_of(Path("/run/tmemfs/swap"), tmp_path) == ["/dev/loop7"]


def test_a_loop_device_that_goes_while_it_is_looked_at_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attach(tmp_path, "loop0", "/run/tmemfs/swap")
    attach(tmp_path, "loop1", "/run/tmemfs/swap")
    real = Path.read_bytes

    def goes(path: Path) -> bytes:
        if "loop0" in path.parts:
            raise OSError(errno.ENODEV, "No such device")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", goes)
    assert swapdev.loop_devices_of(Path("/run/tmemfs/swap"), tmp_path) == ["/dev/loop1"]


@pytest.mark.parametrize(
    ("mountpoint", "kind"),
    [
        ("/run/tmemfs", "fuse.tmemfs"),
        ("/run/tmemfs/", "fuse.tmemfs"),
        ("/run/./tmemfs/../tmemfs", "fuse.tmemfs"),
        ("/run", None),
        ("/run/tmemfs/swap", None),
        ("/", "ext4"),
        ("/mnt/with space", "tmpfs"),
        ("/mnt/twice", "fuse.tmemfs"),
    ],
)
def test_the_type_of_a_mount_is_that_of_the_uppermost_one(mounts: Path, mountpoint: str, kind: str | None) -> None:
    assert swapdev.mount_type(Path(mountpoint), mounts) == kind
    assert swapdev.is_mounted(Path(mountpoint), mounts) == (kind is not None)


def test_a_relative_mountpoint_is_one_below_where_we_are(mounts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mounts.write_text(MOUNTS + f"45 27 0:45 / {tmp_path}/here rw - fuse.tmemfs tmemfs rw\n")
    assert swapdev.mount_type(Path("here"), mounts) == "fuse.tmemfs"


def test_a_mountpoint_may_have_any_name(mounts: Path) -> None:
    assert swapdev.mount_type(Path("/mnt/back\\slash"), mounts) == "tmpfs"


def test_a_mount_is_found_by_a_link_to_it(mounts: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    mounts.write_text(MOUNTS + f"45 27 0:45 / {tmp_path}/real rw - fuse.tmemfs tmemfs rw\n")
    assert swapdev.is_mounted(tmp_path / "link", mounts)


def test_a_loop_device_is_found_by_a_link_to_its_image(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    attach(tmp_path / "sys", "loop0", f"{tmp_path}/real/swap")
    assert swapdev.loop_devices_of(tmp_path / "link" / "swap", tmp_path / "sys") == ["/dev/loop0"]


@pytest.mark.parametrize(
    ("number", "dead"), [(errno.ENOTCONN, True), (errno.ECONNABORTED, True), (errno.EACCES, False), (errno.ENOENT, False)]
)
def test_a_mount_is_dead_when_its_daemon_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, dead: bool
) -> None:
    assert not swapdev.mount_is_dead(tmp_path)

    def fails(path: Path) -> os.statvfs_result:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", fails)
        assert swapdev.mount_is_dead(tmp_path) == dead


def test_unmounting_what_is_not_mounted_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        swapdev.unmount(tmp_path)
    assert caught.value.errno in (errno.EINVAL, errno.EPERM)
    assert caught.value.filename == str(tmp_path)


def test_a_device_that_is_detached_merges_requests_again(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_: list[tuple[str, str]] = []
    monkeypatch.setattr(swapdev, "set_no_merges", lambda device, value: set_.append((device, value)))
    program(programs, "losetup")
    swapdev.detach("/dev/loop9")
    assert set_ == [("/dev/loop9", "0")]


def test_the_programs_are_run_with_what_they_need(programs: Path) -> None:
    program(programs, "losetup", out="/dev/loop9\\n")
    for name in ("mkswap", "swapon", "swapoff"):
        program(programs, name)
    device = swapdev.attach(Path("/run/tmemfs/swap"))
    swapdev.make_swap(device)
    swapdev.swap_on(device, 100)
    swapdev.swap_off(device)
    swapdev.detach(device)
    assert calls(programs) == [
        "losetup --find --show --nooverlap --direct-io=on /run/tmemfs/swap",
        "mkswap /dev/loop9",
        "swapon --discard --priority 100 /dev/loop9",
        "swapoff /dev/loop9",
        "losetup --detach /dev/loop9",
    ]


def test_a_program_that_fails_is_said_with_what_it_said(programs: Path) -> None:
    program(programs, "losetup", exit_code=1, err="losetup: no such device\\n")
    with pytest.raises(
        Refused, match=r"losetup --detach /dev/loop9 failed \(losetup: no such device\): see what uses it with lsof"
    ):
        swapdev.detach("/dev/loop9")


def test_a_swapoff_that_fails_is_said_with_what_to_do(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapdev, "swap_entries", lambda: [SwapEntry("/dev/loop9", GIB, MIB, 100)])
    program(programs, "swapoff", exit_code=1, err="swapoff: cannot allocate memory\\n")
    with pytest.raises(
        Refused, match=r"swapoff /dev/loop9 failed \(swapoff: cannot allocate memory\): free memory or add another swap"
    ):
        swapdev.swap_off("/dev/loop9")


def test_a_program_that_is_not_there_is_said_with_its_package(programs: Path) -> None:
    with pytest.raises(Refused, match="mkswap is not installed: apt-get install util-linux"):
        swapdev.make_swap("/dev/loop9")


def test_a_swapoff_that_is_not_there_is_said_with_its_package(programs: Path) -> None:
    with pytest.raises(Refused, match="swapoff is not installed"):
        swapdev.swap_off("/dev/loop9")


@pytest.mark.parametrize(
    ("used", "available", "other_free", "refused"),
    [
        (100, 106, 0, False),
        (100, 104, 0, True),
        (100, 50, 60, False),
        (100, 50, 54, True),
        (0, 0, 0, False),
    ],
)
def test_a_swap_is_turned_off_only_where_its_pages_fit(
    monkeypatch: pytest.MonkeyPatch, used: int, available: int, other_free: int, refused: bool
) -> None:
    ours = SwapEntry("/dev/loop3", 1000 * MIB, used * MIB, 100)
    other = SwapEntry("/dev/sda2", 200 * MIB, (200 - other_free) * MIB, -2)
    monkeypatch.setattr(swapdev, "swap_entries", lambda: [ours, other])
    monkeypatch.setattr(swapdev, "available_ram_bytes", lambda: available * MIB)
    if not refused:
        swapdev.refuse_if_too_full(ours)
        return
    message = f"100 MiB are swapped out and {available + other_free} MiB of RAM and other swap are free: end some programs"
    with pytest.raises(Refused, match=message):
        swapdev.refuse_if_too_full(ours)


EINVAL = "swapoff: /dev/loop9: swapoff failed: Invalid argument\\n"


def test_a_swapoff_that_is_under_way_is_waited_for(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(programs, "swapoff", exit_code=4, err=EINVAL)
    left = [[SwapEntry("/dev/loop9", GIB, used * MIB, 100)] for used in (30, 20, 20, 10)] + [[]]
    monkeypatch.setattr(swapdev, "swap_entries", lambda: left.pop(0) if len(left) > 1 else left[0])
    monkeypatch.setattr(swapdev, "_POLL_S", 0.001)
    told: list[int] = []
    swapdev.swap_off("/dev/loop9", told.append)
    assert [told[0], min(told)] == [MIB * 30, MIB * 10] and left == [[]]


def test_a_swap_that_nobody_turns_off_is_not_waited_for(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(programs, "swapoff", exit_code=4, err=EINVAL)
    monkeypatch.setattr(swapdev, "swap_entries", lambda: [SwapEntry("/dev/loop9", GIB, MIB, 100)])
    monkeypatch.setattr(swapdev, "_POLL_S", 0.001)
    monkeypatch.setattr(swapdev, "_NO_PROGRESS_S", 0.0)
    with pytest.raises(Refused, match="Invalid argument"):
        swapdev.swap_off("/dev/loop9")


def test_a_swapoff_that_is_taken_over_when_the_other_one_gives_up(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(programs, "swapoff", exit_code=4, err=EINVAL)

    def gives_up(_: int) -> None:
        program(programs, "swapoff")

    monkeypatch.setattr(swapdev, "swap_entries", lambda: [SwapEntry("/dev/loop9", GIB, MIB, 100)])
    monkeypatch.setattr(swapdev, "_POLL_S", 0.001)
    swapdev.swap_off("/dev/loop9", gives_up)


def test_a_daemon_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(swapdev, "in_time", partial(in_time, seconds=0.05))
    monkeypatch.setattr(swapdev, "_is_dead", lambda _: signal.pause())
    monkeypatch.setattr(swapdev, "_loop_status", lambda _: signal.pause())
    assert not swapdev.mount_is_dead(tmp_path)
    assert swapdev.file_behind("/dev/loop9") is None


def test_a_loop_device_has_the_number_that_it_was_attached_with(tmp_path: Path) -> None:
    attach(tmp_path, "loop3", "/mnt/\x0c\u2028 a/swap")
    (tmp_path / "loop3" / "diskseq").write_text("77\n")
    attach(tmp_path, "loop4", "/old")
    assert swapdev.loop_devices(tmp_path) == [
        Loop("/dev/loop3", 77, "/mnt/\x0c\u2028 a/swap"),
        Loop("/dev/loop4", 0, "/old"),
    ]


def test_a_link_that_leads_to_itself_is_a_mountpoint_like_any_other(tmp_path: Path, mounts: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    assert swapdev.mount_at(tmp_path / "circle", mounts) is None
