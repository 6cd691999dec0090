"""Hostile values on a real mount: every control file, every form of writing it, and dozens of real command lines.

What is refused says why in one line; the daemon goes on, and what it holds is still right.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

import tests
from tests.mounted import TMEMFS, Place, mounted, tmemfs
from tests.unit.test_command_fuzz import HOSTILE, command_line
from tmemfs.cli.real_pages import RealPages
from tmemfs.units import PAGE_BYTES

pytestmark = pytest.mark.fuse

#: Errors that a control file may answer a value with.
REFUSALS = {errno.EINVAL, errno.ERANGE, errno.EBUSY, errno.EAGAIN, errno.EACCES, errno.ENOSPC}
#: More than one value, parts of one, and what is no text.
BYTES = (
    b"", b"\n", b"\0", b"64M\0", b"\xff\xfe", b"\xed\xa0\x80", b"64M\n64M\n", b"64M" + b" " * 4000, b"9" * 4096, b"9" * 4097,
    b"\n" * 5000, b"lz4\0zstd", b"all\r\n", b"-9223372036854775809", b"18446744073709551616", b"1e308", b"zstd:" + b"9" * 4000,
)  # fmt: skip
PAGES = 512


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A mount that holds pages; they are verified at the end."""
    pages = RealPages(3)
    with mounted(tmp_path, size="64M") as place:
        fd = os.open(place.image, os.O_RDWR)
        try:
            for slot in range(PAGES):
                os.pwrite(fd, pages.page(slot), slot * PAGE_BYTES)
            yield place
            assert all(os.pread(fd, PAGE_BYTES, slot * PAGE_BYTES) == pages.page(slot) for slot in range(PAGES))
        finally:
            os.close(fd)


def files(place: Place) -> list[Path]:
    """All control files; those that work for long on any factor or size are asked for it elsewhere."""
    return sorted((place.mountpoint / "control").iterdir())


def write(file: Path, data: bytes) -> int:
    """0, or the errno of the open or the write."""
    try:
        fd = os.open(file, os.O_RDWR)
    except OSError as error:
        return error.errno or -1
    try:
        os.write(fd, data)
    except OSError as error:
        return error.errno or -1
    finally:
        os.close(fd)
    return 0


def test_every_control_file_takes_or_refuses_any_value(place: Place) -> None:
    pid = place.pid
    values = [word.encode(errors="surrogateescape") for word in HOSTILE if "\0" not in word] + list(BYTES)
    for file in files(place):
        for value in values:
            number = write(file, value)
            assert number in {0, *REFUSALS}, (file.name, value[:40], errno.errorcode.get(number))
    assert place.pid == pid
    assert [file.read_bytes()[-1:] for file in files(place)] == [b"\n"] * len(files(place))


def test_a_value_is_whole_or_it_is_refused(place: Place) -> None:
    for file in files(place):
        with suppress(OSError):
            fd = os.open(file, os.O_RDWR)
            try:
                for offset in (1, 4096, 1 << 40):
                    with pytest.raises(OSError, match="Invalid argument"):
                        os.pwrite(fd, b"64M", offset)
            finally:
                os.close(fd)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("pool.max", "1K", "pool.max"),
        ("pool.max", "9" * 5000, "pool.max"),
        ("codec", "zstd:" + "9" * 300, "codec"),
        ("codec", "a\nb", "codec"),
        ("shrink", "", "shrink"),
        ("recompress", "\udcff", "recompress"),
        ("pressure.mode", "x" * 4000, "pressure.mode"),
        ("stat", "1", "stat cannot be written"),
        ("pol.max", "1", "did you mean pool.max?"),
        ("..", "1", "is not a control file"),
    ],
)
def test_a_refused_value_is_one_line_with_the_key(place: Place, key: str, value: str, says: str) -> None:
    done = tmemfs("set", key, value, "--mountpoint", place.mountpoint, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr


@pytest.mark.timeout(300)
def test_real_command_lines_with_hostile_words_leave_nothing_behind(place: Place, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for name in ("mount", "empty", "lib"):
        (elsewhere / name).mkdir(0o700, parents=True)
    os.mkfifo(elsewhere / "fifo")
    (elsewhere / "file").write_bytes(b"a thesis")
    before = sorted(elsewhere.rglob("*")), mounts(elsewhere)
    for number in range(60):
        words = harmless(command_line(Random(f"real/{number}"), elsewhere), elsewhere)
        done = hostile_command(words, elsewhere)
        assert done.returncode in (0, 1, 2), (words, done)
        if done.returncode == 2:
            assert done.stderr.startswith("tmemfs: ") and done.stderr.count("\n") == 1, (words, done.stderr)
            assert "bug in tmemfs" not in done.stderr
        if words[0] == "mount" and not done.returncode and "-h" not in " ".join(words):
            tmemfs("umount", elsewhere / "empty")
        (elsewhere / "log").unlink(missing_ok=True)
        assert (sorted(elsewhere.rglob("*")), mounts(elsewhere)) == before, words


def hostile_command(words: list[str], elsewhere: Path) -> subprocess.CompletedProcess[str]:
    """Run the command, where relative paths are harmless."""
    environment = {**os.environ, "PYTHONPATH": str(Path(tests.__file__).parents[1])}
    return subprocess.run(
        [*TMEMFS, *words], capture_output=True, text=True, errors="replace", timeout=60, cwd=elsewhere, env=environment, check=False
    )


def harmless(words: list[str], elsewhere: Path) -> list[str]:
    """The same, but on no place of the machine: 'up' would turn a swap on, and a mountpoint that is not given is everybody's."""
    words = ["mount" if word == "up" else word for word in words if word != "--foreground" and not word.startswith("--priority")]
    if words[0] in ("mount", "down", "umount", "stat", "shrink", "compact", "get", "set") and "--mountpoint" not in words:
        words += ["--mountpoint", str(elsewhere / "empty")]
    if words[0] == "mount":
        words += ["--log", str(elsewhere / "log"), "--backing", "none", "--size", "64M"]
    if words[0] == "demo" and "--size" not in " ".join(words):
        words += ["--size", "64K"]
    return words


def mounts(directory: Path) -> list[str]:
    """Mountpoints below `directory`."""
    return [
        line.split()[1]
        for line in Path("/proc/self/mounts").read_text(errors="surrogateescape").splitlines()
        if str(directory) in line
    ]
