"""Mount and unmount by other ways than one command on one path: bind mounts, relative paths, namespaces, callers with locks."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounted import TMEMFS, Place, mounted, tmemfs, wait_until
from tests.waiting import HANG_S
from tmemfs.system import runtime, swapdev

pytestmark = pytest.mark.fuse

SMALL = ("--size", "64M", "--pool-max", "32M")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A place where nothing is mounted yet."""
    place = Place(tmp_path)
    place.mountpoint.mkdir()
    yield place
    place.end()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Path]:
    """Another directory, to mount at."""
    other = tmp_path / "other"
    other.mkdir()
    yield other
    while swapdev.is_mounted(other):
        swapdev.unmount(other, lazy=True)


def test_mounts_at_once_mount_once(place: Place) -> None:
    command = [*TMEMFS, "mount", *map(str, place.options), *SMALL]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [(process.communicate(timeout=HANG_S)[1], process.returncode) for process in processes]
    assert sorted(code for _, code in answers) == [0, 2, 2], answers
    assert all("is taken by a mount: run" in said for said, code in answers if code)
    assert place.state == "running"


def test_a_record_says_what_was_started_and_goes_with_the_mount(tmp_path: Path) -> None:
    with mounted(tmp_path, "--codec", "zstd:3") as place:
        record = runtime.read_record(place.mountpoint)
        assert record is not None and record.pid == place.pid and record.daemon_lives
        assert record.device == os.stat(place.mountpoint).st_dev
        assert record.options["codec"] == "zstd:3" and record.options["backing"] == str(place.backing)
        tmemfs("umount", place.mountpoint)
        assert runtime.read_record(place.mountpoint) is None


def test_a_record_goes_with_a_mount_that_another_program_unmounts(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        assert runtime.read_record(place.mountpoint)
        subprocess.run(["umount", place.mountpoint], check=True)
        wait_until(lambda: not (runtime.DIRECTORY / f"{runtime.name_for(place.mountpoint)}.json").exists())


def test_umount_of_a_bind_mount_unmounts_all_and_waits_for_the_daemon(tmp_path: Path, other: Path) -> None:
    with mounted(tmp_path) as place:
        pid = place.pid
        subprocess.run(["mount", "--bind", place.mountpoint, other], check=True)
        assert tmemfs("umount", other).stdout == f"{place.mountpoint}: unmounted\n"
        assert not swapdev.is_mounted(place.mountpoint) and not swapdev.is_mounted(other)
        assert runtime.process_started(pid) is None


def test_a_mount_that_another_one_hides_is_refused_before_anything_is_unmounted(tmp_path: Path, other: Path) -> None:
    with mounted(tmp_path) as place:
        subprocess.run(["mount", "--bind", place.mountpoint, other], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", other], check=True)
        done = tmemfs("umount", place.mountpoint, check=False)
        assert done.returncode == 2 and f"a tmpfs mount lies over {other}: unmount that first" in done.stderr
        assert place.state == "running"
        swapdev.unmount(other)
        tmemfs("umount", place.mountpoint)


def test_a_mount_that_a_namespace_holds_is_not_said_to_be_unmounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tmemfs.cli import lifecycle, targets
    from tmemfs.errors import Busy

    monkeypatch.setattr(lifecycle, "_DAEMON_ENDS_S", 0.5)
    with mounted(tmp_path) as place:
        pid = place.pid
        command = ["unshare", "--mount", "sh", "-c", "echo ready; read line"]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
            with targets.of(place.mountpoint, "umount") as target, pytest.raises(Busy, match=f"[( ]{holder.pid}[) ]"):
                lifecycle.umount(target)
            assert runtime.process_started(pid) is not None
            done = tmemfs("stat", place.mountpoint, check=False)
            assert done.returncode == 2 and f"(process {pid}) lives" in done.stderr
        finally:
            holder.communicate("\n", timeout=HANG_S)
        wait_until(lambda: runtime.process_started(pid) is None)
        assert "nothing is up" in tmemfs("down", place.mountpoint).stdout
        assert runtime.read_record(place.mountpoint) is None


def test_the_record_of_a_daemon_that_was_killed_is_dropped_by_the_next_command(tmp_path: Path, other: Path) -> None:
    with mounted(tmp_path) as place:
        pid = place.pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: runtime.process_started(pid) is None)
        swapdev.unmount(place.mountpoint, lazy=True)
        assert "nothing is up" in tmemfs("down", other).stdout  # of another mountpoint
        assert runtime.read_record(place.mountpoint) is None


def test_relative_paths_are_those_of_the_command(place: Place) -> None:
    options = ["mnt", "--backing", "sub/../backing", "--log", "log", *SMALL]
    (place.directory / "sub").mkdir()
    subprocess.run(
        [*TMEMFS, "mount", *options], cwd=place.directory, check=True, timeout=HANG_S, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert place.state == "running" and place.backing.exists() and place.log.exists()
    assert not Path("/backing").exists() and not Path("/log").exists()
    subprocess.run(
        [*TMEMFS, "umount", "./mnt/"],
        cwd=place.directory,
        check=True,
        timeout=HANG_S,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert not swapdev.is_mounted(place.mountpoint)


def test_a_command_in_a_directory_that_has_gone_says_so(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    inside = ["sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', str(gone), *TMEMFS, "stat", "mnt"]
    done = subprocess.run(inside, capture_output=True, text=True, timeout=HANG_S, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert done.returncode == 2 and "mnt: the current directory has gone" in done.stderr, done.stderr


@pytest.mark.parametrize("in_front", [False, True])
def test_a_lock_and_a_pipe_of_the_caller_are_not_kept(place: Place, in_front: bool) -> None:
    lock = os.open(place.directory / "lock", os.O_RDWR | os.O_CREAT)
    reader, writer = os.pipe()
    fcntl.flock(lock, fcntl.LOCK_EX)
    command = [*TMEMFS, "mount", *map(str, place.options), *SMALL, *(["--foreground"] if in_front else [])]
    process = subprocess.Popen(command, pass_fds=[lock, writer], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    os.close(lock)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as pipe:
            assert pipe.read() == b""
        with open(place.directory / "lock", "rb") as again:
            fcntl.flock(again, fcntl.LOCK_EX)  # it closes one after the other; a lock that is kept ends the test as one that hangs
        wait_until(lambda: swapdev.is_mounted(place.mountpoint) and runtime.read_record(place.mountpoint))
        assert place.state == "running"
    finally:
        tmemfs("umount", place.mountpoint, check=False)
        process.communicate(timeout=HANG_S)


def test_what_a_substituted_command_says_comes_at_once(place: Place) -> None:
    command = " ".join([*TMEMFS, "mount", *map(str, place.options), *SMALL])
    done = subprocess.run(
        ["bash", "-c", f'x=$({command} 3>&1 4>&2); echo "got $x"'], capture_output=True, text=True, timeout=HANG_S
    )
    assert done.stdout == f"got {place.mountpoint}: mounted\n"
