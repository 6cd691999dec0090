"""10,000 command lines with hostile words: each is done or refused in one line, with exit code 0 or 2, and leaves nothing behind.

The command runs here, in this process, on a directory that looks like a mount. What it would do to the machine is left out: no
daemon starts and nothing is mounted, but all that is checked before that is. `TMEMFS_FUZZ_SEED` chooses other command lines.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Final

import pytest

from tests.parts import FaultyTier, Regions, new_limits, new_pressure
from tmemfs import cli, supervisor
from tmemfs import options as options_module
from tmemfs.cli import checks, control_io, defaults, demo, doctor, lifecycle, targets
from tmemfs.control import ControlDirectory
from tmemfs.engine import Engine
from tmemfs.jobs.supervision import Jobs
from tmemfs.services import Services
from tmemfs.store.codec import parse_codec
from tmemfs.system import background, capabilities
from tmemfs.system.ownership import open_log
from tmemfs.units import MIB

CASES: Final = 10_000
#: So many case numbers are looked at together for what they left behind.
_BLOCK: Final = 250

#: Words that are sizes, numbers, names and paths, and those that look like it.
HOSTILE: Final = (
    "", " ", "-", "--", "-1", "-0", "0", "1", "1.5", "1.", ".5", "+5", "1e9", "1e999", "nan", "inf", "-inf", "0x10",
    "1_000", "٣", "²", "9" * 20, "9" * 400, "9" * 5000, "-" + "9" * 5000, "1." + "9" * 5000, "4096", "4097", "8M", "8m",
    "8MiB", "8 M", "8MM", "1T", "16T", "900T", "9" * 39 + "T", "max", "MAX", "all", "none", "auto", "off", "25%", "0%",
    "1000%", "-5%", "%", "9" * 40 + "%", "10M", "9M", "lz4", "lz4:", "lz4:1", "LZ4", "zstd", "zstd:", "zstd:0",
    "zstd:19", "zstd:20", "zstd:-1", "zstd:1.5", "zstd:٣", "zstd:" + "9" * 5000, "zstd:3:3", "gzip", "relay", "pyfuse3",
    "2s", "500ms", "1h", "soon", "-2s", "64M deadline=2s", "1M now", "32767", "32768", "-2", "a b", "\t", "\n", "a\nb",
    "\r", "\a", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u00a0", "\u202e", "é", "日本", "\U0001f600", "\udcff",
    "\udc80\udcfe", "a" * 255, "a" * 256, "a" * 5000, "a/" * 3000, "../" * 50, ".", "..", "/", "//", "/.", "/dev/null",
    "/dev/zero", "/dev/full", "/proc/self/mem", "/proc/self/fd/0", "/proc/1/root", "/proc/kmsg", "/sys/kernel",
    "/dev/shm/x", "/nowhere/x", "~", "*", "%s%n", "{0}", "{", "$(id)", "`id`", "'; exit", '"', "\\", "=", "=1", "a=",
    "a=b=c", "-h", "--help", "--version", "--force", "--siz", "@x", "pool.max", "pool.max=1M", "pol.max", "POOL.MAX",
    "stat", "../swap", "control/stat", "state", "pool_current", "pool_current,codec", ",", ",,", "pool_curent",
    "--size=--",
)  # fmt: skip
_MOUNT_OPTIONS: Final = (
    "--size=8M", "--pool-max=64M", "--backing=none", "--backing-max=50%", "--codec=zstd:3", "--kernel-tuning=off",
    "--encrypt=off", "--watchdog=off", "--latency=off", "--log=./log",
)  # fmt: skip
#: Options of each command, with words that are right.
OPTIONS: Final[dict[str, tuple[str, ...]]] = {
    "up": (*_MOUNT_OPTIONS, "--priority=7"),
    "mount": (*_MOUNT_OPTIONS, "--foreground"),
    "down": ("--force",),
    "umount": (),
    "stat": ("--json", "--raw", "--output=codec", "--bytes", "--noheadings"),
    "shrink": ("--deadline=2s", "--raw"),
    "compact": ("--raw", "--deadline=2s"),
    "get": (),
    "set": (),
    "demo": ("--size=64K", "--codec=none", "--directory=."),
    "doctor": ("--backing=./backing",),
}
#: What comes before the options, where it is right.
_FIRST: Final = {"shrink": ["1M"], "compact": ["1.5"], "get": ["codec"], "set": ["pool.max", "64M"]}
#: What the fuzzer found, or a person: each was a traceback, a hang, several lines or 'bug in tmemfs'.
FOUND: Final = (
    ["mount", "MOUNT", "--codec", "zstd:" + "9" * 5000],
    ["up", "a" * 5000],
    ["mount", "--foreground", "a" * 256],
    ["mount", "MOUNT", "--backing", "a" * 256],
    ["mount", "MOUNT", "--log", "FIFO"],
    ["mount", "MOUNT", "--backing", "FIFO"],
    ["stat", "a\nb"],
    ["stat", "\udcff"],
    ["get", ".", "--mountpoint", "MOUNT"],
    ["get", "a" * 256, "--mountpoint", "MOUNT"],
    ["shrink", "", "--mountpoint", "MOUNT"],
    ["stat", "--output", "", "MOUNT"],
    ["doctor", "--backing", "a" * 256],
    ["demo", "--size", "900T"],
    ["demo", "--size", "4096", "--directory", "/dev/null"],
    ["demo", "--size", "4096", "--directory", "a" * 256],
    ["up", "MOUNT", "--priority", "9" * 5000],
    ["\udcff"],
    ["demo", "--size=--"],
    ["mount", "LOOP"],
    ["up", "LOOP"],
)


@dataclass(frozen=True)
class Target:
    """What the steps of the life cycle work on."""

    mountpoint: Path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a mount that is none, and one of each kind of file; what would change the machine is left out."""
    place = tmp_path / "place"
    for name in ("mount/control", "empty", "cwd", "lib"):
        (place / name).mkdir(0o700, parents=True)
    _fill_control(place / "mount" / "control")
    os.mkfifo(place / "fifo")
    (place / "loop").symlink_to("loop")
    (place / "link").symlink_to("file")
    (place / "file").write_bytes(b"a thesis")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(place / "socket"))
    monkeypatch.chdir(place / "cwd")
    monkeypatch.setattr(defaults, "MOUNTPOINT", place / "empty")
    monkeypatch.setattr(defaults, "BACKING", place / "lib" / "backing")
    monkeypatch.setattr(defaults, "LOG", place / "log")
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    _leave_out_effects(monkeypatch)
    return place


def _fill_control(directory: Path) -> None:
    """The control files, with what a daemon says in them."""
    regions = Regions.new(slots=64, frames=10, extents=10)
    engine = Engine.over(partial(regions.start, 10, 64), FaultyTier(), parse_codec("lz4"))
    outcomes = {"memory_locked": 1, "io_flusher": 1, "oom_score_adj_set": 1, "realtime": 1}
    services = Services(engine, new_limits(engine, 64 * MIB, 10 * MIB), new_pressure(engine), Jobs(), outcomes)
    for attribute in ControlDirectory(services).attributes:
        (directory / attribute.name).write_text(attribute.read())
    regions.close()


def _leave_out_effects(patch: pytest.MonkeyPatch) -> None:
    def start(serve: Callable[[Callable[[], None]], None], log: Path) -> None:
        os.close(open_log(log))
        try:
            serve(lambda: None)
        finally:
            background._remove_empty(log)

    def up(target: Target, priority: int, compare: Callable[[], None], start: Callable[[], None]) -> str:
        start()
        return "up"

    @contextlib.contextmanager
    def target_of(mountpoint: Path, _: str) -> Iterator[Target]:
        yield Target(mountpoint)

    def try_demo(size_bytes: int, codec: object, directory: Path) -> None:
        demo._refuse_too_large(size_bytes, directory)
        with demo._backing(directory):
            pass

    patch.setattr(background, "run_in_background", start)
    patch.setattr(supervisor, "serve", lambda options, ready: options_module.check(options))
    patch.setattr(capabilities, "require_root", lambda: None)
    patch.setattr(options_module, "require_root", lambda: None)
    patch.setattr(background, "open_standard_descriptors", lambda: None)
    patch.setattr(background, "close_inherited", lambda: None)
    patch.setattr(targets, "of", target_of)
    patch.setattr(lifecycle, "refuse_taken", lambda target: None)
    patch.setattr(lifecycle, "up", up)
    patch.setattr(lifecycle, "down", lambda *_, **__: "nothing is up")
    patch.setattr(lifecycle, "umount", lambda *_, **__: None)
    patch.setattr(demo, "run", try_demo)
    patch.setattr(control_io, "_write", lambda fd, value, reason: None)
    patch.setattr(doctor, "_pressure", lambda name: checks.Check(name, True, "not tried"))


def hostile(rng: Random, place: Path) -> str:
    """A word that is a size, a number, a name or a path, or that nobody would write."""
    if rng.random() < 0.2:
        return str(place / rng.choice(("mount", "empty", "fifo", "socket", "file", "link", "loop", "new", "file/x", "no/x")))
    if rng.random() < 0.1:
        ranges = ((1, 128), (128, 0x2100), (0xDC80, 0xDD00))
        return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 12)))
    return rng.choice(HOSTILE)


def command_line(rng: Random, place: Path) -> list[str]:
    """A command with options and words of which some are hostile, and the others right: each check is reached."""
    command = rng.choice(list(OPTIONS))
    words = [hostile(rng, place) if rng.random() < 0.02 else command]
    words += _FIRST.get(command, []) if rng.random() < 0.4 else [hostile(rng, place) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
    known = OPTIONS[command]
    for option in rng.sample(known, min(len(known), rng.randrange(4))):
        name, has_word, word = option.partition("=")
        if has_word and rng.random() < 0.7:
            word = hostile(rng, place)
        words += [f"{name}={word}"] if has_word and rng.random() < 0.7 else [name, word] if has_word else [name]
    if command not in ("demo", "doctor") and rng.random() < 0.8:
        directory = "empty" if command in ("up", "mount") else "mount"
        words += ["--mountpoint", str(place / directory) if rng.random() < 0.9 else hostile(rng, place)]
    if rng.random() < 0.1:
        words.insert(rng.randrange(1, len(words) + 1), hostile(rng, place))
    return words


def run(words: list[str]) -> tuple[int, str]:
    """Exit code and standard error; output is encoded as for a terminal."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(words)
        except SystemExit as end:  # --help and --version
            assert end.code == 0, words
            code = 0
    out.flush()
    err.flush()
    assert isinstance(err.buffer, io.BytesIO)
    return code, err.buffer.getvalue().decode()


def check(words: list[str]) -> None:
    """The command line is done, or refused in one line."""
    try:
        code, said = run(words)
    except Exception as error:
        raise AssertionError(f"{words} raised {error!r}") from error
    if code == 2:
        line = said.removesuffix("\n")
        assert line.startswith("tmemfs: ") and line.isprintable() and 20 < len(line) < 700, (words, said)
        assert "bug in tmemfs" not in line and "Traceback" not in line and "Error(" not in line, (words, said)
    else:
        assert said == "" and code == (words[0] == "doctor" and code), (words, code, said)


def left_in(place: Path) -> tuple[list[Path], list[str], int]:
    """All that a command may leave: files here, in the root directory, open descriptors."""
    gc.collect()
    return sorted(place.rglob("*")), sorted(os.listdir("/")), len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("words", FOUND, ids=lambda words: " ".join(words)[:40].encode("unicode_escape").decode())
def test_what_was_found_once_is_refused_in_a_line(place: Path, words: list[str]) -> None:
    before = left_in(place)
    check([str(place / word.lower()) if word in ("MOUNT", "FIFO", "LOOP") else word for word in words])
    assert left_in(place) == before


@pytest.mark.timeout(900)
def test_any_command_line_is_done_or_refused_in_a_line(place: Path) -> None:
    seed = os.environ.get("TMEMFS_FUZZ_SEED", "1")
    before = left_in(place)
    for first in range(0, CASES, _BLOCK):
        for number in range(first, first + _BLOCK):
            check(command_line(Random(f"{seed}/{number}"), place))
        assert left_in(place) == before, f"one of the cases from {first} on left something behind"
