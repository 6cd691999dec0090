"""`make clean` removes nothing that a tmemfs which is up still needs."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import in_use

ROOT = Path(__file__).parents[2]
TABLE = (
    b"proc /proc proc rw 0 0\n"
    b"tmemfs /run/tmemfs fuse.tmemfs rw,nosuid 0 0\n"
    b"tmemfs /mnt/\xff\xe2\x80\xa8\\040x fuse.tmemfs rw 0 0\n"
    b"other /mnt/fuse.tmemfs fuse.other rw 0 0\n"
)


def test_mounts_of_ours_are_found_whatever_their_names_are() -> None:
    assert in_use.mountpoints(TABLE) == ["/run/tmemfs", "/mnt/\\xff\u2028\\040x"]


def test_a_process_that_has_our_files_mapped_is_found(tmp_path: Path) -> None:
    for pid, maps in (
        ("7", f"7f00-7f01 r-xp 0 08:01 5 {tmp_path}/x/.venv/lib/a.so\n"),
        ("8", "7f00-7f01 r-xp 0 08:01 5 /lib/b.so\n"),
    ):
        (tmp_path / "proc" / pid).mkdir(parents=True)
        (tmp_path / "proc" / pid / "maps").write_text(maps)
    (tmp_path / "proc" / "9").mkdir()
    (tmp_path / "proc" / "self").mkdir()
    assert in_use.processes_from(tmp_path / "x", tmp_path / "proc") == [7]
    assert in_use.processes_from(tmp_path / "y", tmp_path / "proc") == []


def test_this_process_is_found_by_another_one(tmp_path: Path) -> None:
    (tmp_path / "library").write_bytes(bytes(4096))
    with open(tmp_path / "library", "rb") as file, mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ):
        done = subprocess.run([sys.executable, ROOT / "tools/in_use.py", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"clean: process {os.getpid()} runs from {tmp_path}: run 'sudo make down' first" in done.stderr


@pytest.mark.parametrize("mounted", [True, False])
def test_it_is_said_where_something_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mounted: bool
) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda path: TABLE if mounted and path.name == "mounts" else b"")
    assert in_use.main(tmp_path) == int(mounted)
    said = capsys.readouterr().err
    assert said.count("\n") == (2 if mounted else 0) and ("clean: /run/tmemfs is mounted: run 'sudo make down'" in said) == mounted


@pytest.mark.parametrize(
    "words", [["down", "/nowhere"], ["stat", "/nowhere"], ["set", "a", "b", "--mountpoint", "/nowhere"], ["doctor"]]
)
def test_commands_on_a_daemon_need_the_standard_library_only(words: list[str]) -> None:
    command = [sys.executable, "-S", "-m", "tmemfs", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert "Traceback" not in done.stderr and "Error" not in done.stderr, done.stderr
    assert words != ["doctor"] or "missing: trio pyfuse3 lz4 zstandard xxhash" in done.stdout
