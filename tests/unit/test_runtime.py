"""Locks and records: one holder at a time, whatever ends it, and a record that is whole or not there."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmemfs.errors import Refused
from tmemfs.system import runtime
from tmemfs.system.runtime import MountRecord

NAME = "run-tmemfs.lock"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runtime, "DIRECTORY", tmp_path / "tmemfs.d")
    return tmp_path / "tmemfs.d"


def record(mountpoint: str = "/run/tmemfs", pid: int | None = None, started: int | None = None) -> MountRecord:
    pid = os.getpid() if pid is None else pid
    started = runtime.process_started(pid) if started is None else started
    assert started is not None
    return MountRecord(mountpoint, pid, started, runtime.boot_id(), 40, "0.1.0", {"codec": "lz4"})


def held(directory: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock until a line comes."""
    code = f"""
import sys
from pathlib import Path
from tmemfs.system import runtime
runtime.DIRECTORY = Path({str(directory)!r})
with runtime.locked({NAME!r}, "tmemfs down /run/tmemfs"):
    print("held", flush=True)
    sys.stdin.readline()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_directory_is_for_root_alone(directory: Path) -> None:
    assert runtime.runtime_directory() == directory
    assert directory.stat().st_mode & 0o7777 == 0o700
    assert runtime.runtime_directory() == directory


@pytest.mark.parametrize("kind", ["file", "link", "writable"])
def test_a_directory_that_others_made_is_refused(directory: Path, kind: str) -> None:
    if kind == "file":
        directory.write_text("")
    elif kind == "link":
        directory.symlink_to("/tmp")
    else:
        directory.mkdir()
        directory.chmod(0o777)
    with pytest.raises(Refused, match="only root can write to: remove it"):
        runtime.runtime_directory()


def test_who_waits_is_told_for_whom_and_goes_on_when_it_ends(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_SAID_AFTER_S", 0.1)
    with held(directory) as holder:
        flock = fcntl.flock

        def end_the_holder(fd: int, operation: int) -> None:
            if operation == fcntl.LOCK_EX:  # it waits from here on
                holder.kill()
            flock(fd, operation)

        monkeypatch.setattr(fcntl, "flock", end_the_holder)
        with runtime.locked(NAME, "tmemfs up /run/tmemfs"):
            assert (directory / NAME).read_text() == f"{os.getpid()} (tmemfs up /run/tmemfs)"
    said = capsys.readouterr().err
    assert said == f"tmemfs: waiting for process {holder.pid} (tmemfs down /run/tmemfs), which holds the same lock\n"
    assert list(directory.iterdir()) == []


def test_nobody_else_gets_a_lock_that_is_held() -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with runtime.locked(NAME, "test"):
                with lock:
                    inside += 1
                    most = max(most, inside)
                with lock:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_program_that_is_run_does_not_inherit_the_lock(directory: Path) -> None:
    with runtime.locked(NAME, "test"):
        shown = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, close_fds=False, check=True).stdout
    assert NAME not in shown


def test_a_record_is_read_as_it_was_written() -> None:
    written = record(os.fsdecode(b"/mnt/\xff \n")).with_loop("/dev/loop3", 77)
    runtime.write_record(written)
    assert runtime.read_record(Path(written.mountpoint)) == written
    assert runtime.read_records() == [written] and written.daemon_lives
    runtime.remove_record(Path(written.mountpoint))
    runtime.remove_record(Path(written.mountpoint))
    assert runtime.read_records() == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"mountpoint": 1}', '{"new": 1}'])
def test_a_record_that_is_not_understood_is_none(directory: Path, text: str) -> None:
    (runtime.runtime_directory() / "run-tmemfs.json").write_text(text)
    assert runtime.read_record(Path("/run/tmemfs")) is None and runtime.read_records() == []


def test_a_later_process_with_the_same_number_is_another_one() -> None:
    started = runtime.process_started(os.getpid())
    assert started is not None
    assert not record(started=started - 1).daemon_lives
    assert not MountRecord("/m", os.getpid(), started, "another boot", 40, "0.1.0").daemon_lives


def test_a_process_that_has_ended_lives_no_more_though_nobody_waited_for_it() -> None:
    process = subprocess.Popen(["true"])
    started = runtime.process_started(process.pid)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert runtime.process_started(process.pid) is None
    process.wait()
    assert not record(pid=process.pid, started=started or 1).daemon_lives


def test_a_record_is_dropped_unless_somebody_works_on_its_mount_or_it_is_new(directory: Path) -> None:
    old, new = record(started=1), record()
    runtime.write_record(old)
    lock = runtime.lock_of(Path(old.mountpoint))
    with runtime.locked(lock, "test"):
        runtime.drop_record(old, is_locked=False)
        assert runtime.read_records() == [old]
        runtime.drop_record(old, is_locked=True)
        assert runtime.read_records() == []
    runtime.write_record(new)
    runtime.drop_record(old, is_locked=False)
    assert runtime.read_records() == [new]
    runtime.drop_record(new, is_locked=False)
    assert list(directory.iterdir()) == []


@given(st.binary(min_size=1, max_size=400), st.binary(min_size=1, max_size=400))
def test_each_mountpoint_has_a_file_name_of_its_own(one: bytes, other: bytes) -> None:
    paths = [Path("/" + os.fsdecode(name.replace(b"\0", b"/"))) for name in (one, other)]
    names = [runtime.name_for(path) for path in paths]
    assert all(0 < len(name) < 240 and "/" not in name and name.isascii() for name in names if name)
    assert (names[0] == names[1]) == (os.fspath(paths[0]).lstrip("/") == os.fspath(paths[1]).lstrip("/"))
