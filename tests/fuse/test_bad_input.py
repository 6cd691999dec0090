"""What cannot work is refused: exit code 2, a message with the next step, and nothing changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounted import TMEMFS, Place, mounted, tmemfs
from tmemfs.host import swapdev

pytestmark = pytest.mark.fuse


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    place.mountpoint.mkdir()
    return place


def refused(place: Place, *options: str | Path, says: str) -> None:
    """`mount` and `up` with `options` added are refused, and leave everything as it was."""
    before = sorted(place.directory.rglob("*"))
    for command in ("mount", "up"):
        done = tmemfs(command, *place.options, *options, check=False)
        assert done.returncode == 2, (command, done.stdout, done.stderr)
        assert says in done.stderr
        assert not swapdev.is_mounted(place.mountpoint)
        assert not swapdev.loop_devices_of(place.image)
    assert [path for path in sorted(place.directory.rglob("*")) if path != place.log] == before


@pytest.mark.parametrize("size", ["0", "-5M", "-1", "many", "5000", "4097", "1E", ""])
def test_a_size_that_is_no_number_of_pages(place: Place, size: str) -> None:
    refused(place, f"--size={size}", says="give" if size not in ("many", "1E", "") else "is not a size")


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--pool-max=4000G", "is above RAM"),
        ("--pool-max=1M", "is too small to swap with"),
        ("--pool-max=x", "is not a size"),
        ("--codec=gzip", "choose lz4, zstd"),
        ("--codec=zstd:77", "give zstd:1 to zstd:19"),
        ("--backing-max=x", "is not a size"),
    ],
)
def test_a_setting_that_cannot_be_honoured(place: Place, option: str, says: str) -> None:
    refused(place, option, says=says)


def test_a_mountpoint_that_is_missing(tmp_path: Path) -> None:
    refused(Place(tmp_path), says="create it (mkdir -p")


def test_a_mountpoint_that_is_not_empty(place: Place) -> None:
    (place.mountpoint / "something").touch()
    refused(place, says="is not empty: give an empty directory")


def test_a_mountpoint_that_is_taken(place: Place) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", place.mountpoint], check=True)
    try:
        for command, says in (("mount", "is taken by a tmpfs"), ("up", "is taken by a tmpfs"), ("down", "is taken by a tmpfs")):
            options = place.options if command != "down" else [place.mountpoint]
            done = tmemfs(command, *options, check=False)
            assert done.returncode == 2 and says in done.stderr
        assert swapdev.mount_type(place.mountpoint) == "tmpfs"
    finally:
        swapdev.unmount(place.mountpoint)


def test_a_backing_directory_that_is_missing(place: Place) -> None:
    refused(place, "--backing", place.directory / "nowhere" / "backing", says="does not exist: create it")


def test_a_backing_that_is_a_directory(place: Place) -> None:
    refused(place, "--backing", place.directory, says="is a directory: give the path of a file in it")


@pytest.mark.parametrize(("options", "says"), [("ro", "cannot be written to"), ("size=64K", "is full: free space")])
def test_a_backing_directory_that_is_read_only_or_full(place: Place, tmp_path: Path, options: str, says: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", other], check=True)
    try:
        refused(place, "--backing", other / "backing", says=says)
    finally:
        swapdev.unmount(other)


def test_a_foreign_file_is_never_touched(place: Place) -> None:
    place.backing.write_bytes(b"my thesis" * 1000)
    place.backing.chmod(0o600)
    refused(place, says="was not made by tmemfs")
    assert place.backing.read_bytes() == b"my thesis" * 1000


def test_an_empty_foreign_file_is_never_touched(place: Place) -> None:
    place.backing.touch(0o600)
    refused(place, says="was not made by tmemfs")
    assert place.backing.read_bytes() == b""


def test_a_backing_that_is_in_use(tmp_path: Path) -> None:
    with mounted(tmp_path) as first:
        other = Place(tmp_path / "second")
        other.mountpoint.mkdir(parents=True)
        refused(other, "--backing", first.backing, says="is in use by another tmemfs daemon")
        assert first.state == "running"


def test_a_mount_twice(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        done = tmemfs("mount", *place.options, check=False)
        assert done.returncode == 2 and "is taken by a mount" in done.stderr
        assert place.state == "running"


def test_not_root(place: Place) -> None:
    become_nobody = "import os, sys, tmemfs.cli, tmemfs.host.doctor, tmemfs.host.lifecycle, tmemfs.view; os.setuid(65534)"
    for command in ("mount", "up", "down", "umount"):
        script = f"{become_nobody}; sys.exit(tmemfs.cli.main([{command!r}, {str(place.mountpoint)!r}]))"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2 and "need root: run it with sudo" in done.stderr, done.stderr


def test_no_fuse_device(place: Place) -> None:
    inside = 'mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", inside, "sh", *TMEMFS, "mount", *map(str, place.options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "modprobe fuse" in done.stderr
    assert not place.backing.exists()


def test_commands_on_nothing_mounted(place: Place) -> None:
    option = ("--mountpoint", str(place.mountpoint))
    for command in (("stat", option[1]), ("umount", option[1]), ("get", "state", *option), ("shrink", "1M", *option)):
        done = tmemfs(*command, check=False)
        assert done.returncode == 2 and "nothing is mounted at" in done.stderr
    assert "nothing is up" in tmemfs("down", place.mountpoint).stdout


def test_an_unknown_control_file(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        for command in (["get", "speed"], ["set", "speed=9"], ["get", "../swap"]):
            done = tmemfs(*command, "--mountpoint", place.mountpoint, check=False)
            assert done.returncode == 2 and "control file" in done.stderr
        assert tmemfs("set", "pool.max", "--mountpoint", place.mountpoint, check=False).returncode == 2
