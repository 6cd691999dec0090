"""What cannot work is refused: exit code 2, a message with the next step, and nothing changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounted import TMEMFS, Place, mounted, tmemfs
from tests.waiting import HANG_S
from tmemfs.system import swapdev

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


def test_a_backing_directory_that_is_read_only(place: Place, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", other], check=True)
    try:
        refused(place, "--backing", other / "backing", says="cannot be written to")
    finally:
        swapdev.unmount(other)


def test_a_backing_directory_on_a_file_system_that_is_full(place: Place, tmp_path: Path) -> None:
    other, disk = tmp_path / "other", tmp_path / "disk"
    other.mkdir()
    disk.write_bytes(bytes(1 << 20))
    subprocess.run(["mkfs.ext2", "-q", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, other], check=True)
    try:
        refused(place, "--backing", other / "backing", says="is full: free space")
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
    become_nobody = "import os, sys, tmemfs.cli, tmemfs.cli.doctor, tmemfs.cli.lifecycle, tmemfs.cli.view; os.setuid(65534)"
    for command in ("mount", "up", "down", "umount"):
        script = f"{become_nobody}; sys.exit(tmemfs.cli.main([{command!r}, {str(place.mountpoint)!r}]))"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANG_S, check=False)
        assert done.returncode == 2 and "need root: run it with sudo" in done.stderr, done.stderr


def test_no_fuse_device(place: Place) -> None:
    inside = 'mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", inside, "sh", *TMEMFS, "mount", *map(str, place.options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
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


@pytest.mark.parametrize(
    ("limit", "says"),
    [("-n 18", "the limit on open files is 18"), ("-f 100", "the limit on the size of a file"), ("-v 4000000", "address space")],
)
def test_a_resource_limit_that_is_too_low_leaves_no_dead_mount(place: Place, limit: str, says: str) -> None:
    for command in ("mount", "up"):
        words = [*TMEMFS, command, *map(str, place.options)]
        inside = ["bash", "-c", f'ulimit {limit}; exec "$@"', "bash", *words]
        done = subprocess.run(inside, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not swapdev.is_mounted(place.mountpoint) and not place.backing.exists() and not place.log.exists()


@pytest.mark.parametrize("step", ["Relay.start", "Relay.__init__", "pyfuse3.init", "Pager.warm"])
def test_a_start_that_fails_after_the_mount_leaves_no_dead_mount(place: Place, step: str) -> None:
    script = (
        "import sys, pyfuse3, tmemfs.cli, tmemfs.supervisor\n"
        "from tmemfs.worker import Pager, Relay\n"
        "def fails(*_):\n    raise MemoryError('no memory for it')\n"
        f"{step} = fails\n"
        f"sys.exit(tmemfs.cli.main(sys.argv[1:]))\n"
    )
    words = ["mount", *map(str, place.options)]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "the kernel refused what the daemon needs (no memory for it)" in done.stderr
    assert not swapdev.is_mounted(place.mountpoint)


def test_a_block_device_of_one_mib_is_refused_before_anything_is_written(place: Place) -> None:
    small = place.directory / "small"
    small.write_bytes(bytes(1 << 20))
    device = subprocess.run(["losetup", "--find", "--show", small], capture_output=True, text=True, check=True).stdout.strip()
    try:
        refused(place, "--backing", device, says="has space for 0 B, not even one segment: give a larger device as --backing")
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert small.read_bytes() == bytes(1 << 20)


def test_a_link_to_a_block_device_is_followed_and_one_in_ram_is_refused(place: Place) -> None:
    device = swapdev_over(Path("/dev/shm/tmemfs-test-disk"))
    link = place.directory / "by-id"
    link.symlink_to(device)
    try:
        refused(place, "--backing", link, says=f"{device} is in RAM (a file on tmpfs)")
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
        Path("/dev/shm/tmemfs-test-disk").unlink()


def swapdev_over(file: Path) -> str:
    """A loop device over a new file of 8 MiB."""
    file.write_bytes(bytes(8 << 20))
    return subprocess.run(["losetup", "--find", "--show", file], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("option", ["--backing", "--log"])
def test_what_is_no_file_is_refused_at_once(place: Place, option: str) -> None:
    fifo = place.directory / "fifo"
    subprocess.run(["mkfifo", "-m", "600", fifo], check=True)
    for path, kind in ((fifo, "a FIFO"), (Path("/dev/null"), "a character device"), (Path("/dev/zero"), "a character device")):
        refused(place, option, path, says=f"{path} is {kind}")


def test_a_backing_in_ram_is_refused(place: Place) -> None:
    refused(place, "--backing", "/dev/shm/tmemfs-backing", says="is in RAM (tmpfs), which would free nothing")


def test_tables_that_would_take_more_than_an_eighth_of_ram(place: Place) -> None:
    refused(place, "--size=16T", says="more than an eighth of RAM")


def test_the_doctor_serves_an_ordinary_user(place: Place) -> None:
    script = "import os, sys, tmemfs.cli, tmemfs.cli.doctor, tmemfs.tiers.file, tmemfs.store.native; os.setuid(65534)"
    for backing in ("/root/x/backing", "/dev/loop0", "/var/lib/tmemfs/backing", place.backing):
        words = [sys.executable, "-c", f"{script}; sys.exit(tmemfs.cli.main(['doctor', '--backing', {str(backing)!r}]))"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1 and done.stderr == "" and "root                   FAILS" in done.stdout, done.stderr
