"""The corpus: maps and page maps parsed, pages sampled, figures and tables made, missing programs named; one child captured."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from tests.waiting import HANG_S
from tmemfs.errors import BadValue, Refused
from tmemfs.units import PAGE_BYTES
from tools.corpus import __main__ as command
from tools.corpus.pages import Area, Capture, Place, capture, descendants, distinct, parse_maps, parse_pagemap, sample
from tools.corpus.redis_values import commands, encoded
from tools.corpus.report import Figures, Row, as_json, bounds, figures, parse_json, report, table
from tools.corpus.sources import SOURCES, missing
from tools.corpus.stage import last_line

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the memory of other processes is for root only")

MAPS = """\
55d0c8a00000-55d0c8a02000 r-xp 00001000 fe:00 1234                       /usr/bin/a program
55d0c9000000-55d0c9021000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000002000 rw-p 00000000 00:00 0
7f0010000000-7f0020000000 ---p 00000000 00:00 0
7f0030000000-7f0030001000 rw-s 00000000 00:01 1025                       /dev/zero (deleted)
7f0031000000-7f0031001000 rw-s 00000000 00:01 1026                       /memfd:shared (deleted)
7f0032000000-7f0032001000 rw-s 00000000 fe:00 99                         /var/lib/a file
7ffd00000000-7ffd00001000 rw-p 00000000 00:00 0                          [stack]
7ffd00100000-7ffd00104000 r--p 00000000 00:00 0                          [vvar]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
"""
PRESENT, SWAPPED, FILE_OR_SHARED = 1 << 63, 1 << 62, 1 << 61
CHILD = """\
import mmap, os, random, sys
held = random.Random(1).randbytes(32 << 20)
shared = mmap.mmap(-1, 1 << 20)
shared[:] = b"tmemfs.." * (1 << 17)
if os.fork():
    print("ready", flush=True)
sys.stdin.read()
"""
STAGED = """\
import time
from tools.corpus.stage import stage
with stage() as there:
    started = there.start("sh", ["sh", "-c", "setsid sleep 1000 & echo ready $!; wait"])
    started.wait_for_word("ready")
    print(there.directory, started.pid, started.said().split()[1], flush=True)
    time.sleep(1000)
"""


def figures_of(rest: int) -> Figures:
    return Figures(rest + 3, 2, 1, 1, 2.5, 3.25, 100, 1600, 3000)


def test_areas_are_the_private_ones_and_shared_memory_without_a_file() -> None:
    assert parse_maps(MAPS) == [
        Area(0x55D0C8A00000, 0x55D0C8A02000, "private"),
        Area(0x55D0C9000000, 0x55D0C9021000, "private"),
        Area(0x7F0000000000, 0x7F0000002000, "private"),
        Area(0x7F0030000000, 0x7F0030001000, "shared"),
        Area(0x7F0031000000, 0x7F0031001000, "shared"),
        Area(0x7FFD00000000, 0x7FFD00001000, "private"),
    ]


def test_a_page_of_a_file_is_not_anonymous_and_a_swapped_one_is_not_there() -> None:
    entries = array("Q", [0, PRESENT | 7, PRESENT | FILE_OR_SHARED | 8, SWAPPED | 9, PRESENT | 1 << 55 | 10])
    assert list(parse_pagemap(entries, 0x10000, "private")) == [(0x11000, 7), (0x14000, 10)]


def test_shared_memory_has_the_bit_of_files_and_counts() -> None:
    assert list(parse_pagemap([PRESENT | FILE_OR_SHARED | 8, SWAPPED], 0, "shared")) == [(0, 8)]


def test_a_frame_counts_once_unless_the_kernel_hides_its_number() -> None:
    places = [Place(1, 0, "private", 7), Place(2, 0, "private", 7), Place(1, 4096, "private", 0), Place(2, 4096, "private", 0)]
    assert distinct(places) == [places[0], places[2], places[3]]


def test_few_pages_are_all_sampled() -> None:
    assert sample(3, 5, seed=1) == sample(3, 3, seed=1) == [0, 1, 2]
    assert sample(0, 5, seed=1) == []


def test_many_pages_are_sampled_evenly_and_the_same_again() -> None:
    chosen = sample(1003, 10, seed=1)
    assert [at * 10 // 1003 for at in chosen] == list(range(10))
    assert chosen == sample(1003, 10, seed=1) != sample(1003, 10, seed=2)


def test_a_family_goes_down_all_generations() -> None:
    assert descendants(2, {2: 1, 3: 2, 4: 1, 5: 3, 6: 5}) == [2, 3, 5, 6]


def test_figures_set_zero_pages_and_one_word_apart() -> None:
    half = Random(1).randbytes(PAGE_BYTES // 2) + bytes(PAGE_BYTES // 2)
    noise = Random(2).randbytes(PAGE_BYTES)
    got = figures([bytes(PAGE_BYTES), b"12345678" * 512, half, noise])
    assert (got.pages, got.zero, got.one_word, got.raw, got.rest) == (4, 1, 1, 1, 2)
    assert got.lz4_ratio == pytest.approx(8192 / (4096 + 2048), rel=0.02)
    assert got.p10_bytes == pytest.approx(2048, rel=0.02) and got.p90_bytes == PAGE_BYTES


def test_figures_of_nothing_to_compress_have_no_ratio() -> None:
    assert figures([bytes(PAGE_BYTES)]) == Figures(1, 1, 0, 0)
    assert figures([]) == Figures(0, 0, 0, 0)


def test_the_bounds_are_nothing_gained_and_nothing_left() -> None:
    noise, zero = bounds()
    assert (noise.figures.lz4_ratio, noise.figures.raw) == (1.0, noise.figures.pages)
    assert zero.figures.zero == zero.figures.pages


def test_a_table_has_a_line_for_each_source_and_no_sum() -> None:
    lines = table([Row("a", 12345, 7, figures_of(97)), Row("b", 1, 0, Figures(1, 1, 0, 0))]).splitlines()
    assert lines[2] == "| a | 12,345 | 7 | 100 | 2.0% | 1.0% | 2.50 | 3.25 | 1.0% | 100 | 1600 | 3000 |"
    assert lines[3] == "| b | 1 | 0 | 1 | 100.0% | 0.0% | - | - | - | - | - | - |"
    assert len(lines) == 4


def test_a_report_has_the_bounds_and_says_what_is_left_out() -> None:
    text = report([], {"redis": "no redis-server"}, {})
    assert "| random |" in text and "| zero |" in text
    assert "Left out:\n\n- redis: no redis-server\n" in text and "Failed" not in text


def test_lines_are_read_as_they_were_written() -> None:
    rows = [Row("a", 2, 1, figures_of(1)), Row("b", 1, 0, Figures(1, 1, 0, 0))]
    text = as_json(rows)
    assert parse_json(text) == rows and len(text.splitlines()) == 4
    with pytest.raises(ValueError):
        parse_json('[{"name": "a"}]')


def test_a_missing_program_is_named_with_its_package() -> None:
    [redis] = command.chosen("redis")
    assert missing(redis, lambda need: None) == "no redis-server: run 'sudo make corpus', or install redis-server (Debian)"
    assert missing(redis, lambda need: Path("/bin") / need) == ""


def test_every_source_missing_is_exit_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "locate", lambda need: None)
    assert command.main([]) == 2
    said = capsys.readouterr().err
    assert all(source.packages in said for source in SOURCES)


def test_an_unknown_source_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "redis,word"]) == 2
    assert "no such source: word; choose from postgresql,redis," in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_no_pages_are_no_number_of_pages(count: str) -> None:
    with pytest.raises(SystemExit):
        command.main([f"--pages={count}"])


def test_a_foreign_corpus_json_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "corpus.json").write_text('{"a": 1}')
    with pytest.raises(BadValue, match="remove it"):
        command._kept(tmp_path)


def test_redis_commands_are_the_same_for_the_same_seed() -> None:
    assert encoded("SET", "k", b"\0v") == b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$2\r\n\0v\r\n"
    prose = "all work and no play " * 1000
    assert list(commands(4, prose)) == list(commands(4, prose)) != list(commands(4, prose, seed=2))


def test_the_last_line_said_is_the_reason() -> None:
    assert last_line("one\n  two \n\n") == "two"
    assert last_line("\n") == "it said nothing"


@contextmanager
def python(program: str) -> Iterator[subprocess.Popen[str]]:
    """A child that runs `program` in the checkout; it ends with the block, as do those that read its stdin."""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def wait_until_it_sleeps(pid: int) -> None:
    """Neither stopped nor at work any more."""
    deadline = time.monotonic() + HANG_S
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        assert time.monotonic() < deadline
        time.sleep(0.005)


def capture_twice_the_same(pid: int, most: int) -> Capture:
    """What two captures in a row agree on, once the programs have come to rest."""
    deadline = time.monotonic() + HANG_S
    got = capture(pid, most)
    while (again := capture(pid, most)).pages != got.pages:
        assert time.monotonic() < deadline, "every capture takes other pages"
        got = again
    return got


@needs_root
def test_a_child_and_its_child_are_captured_and_what_they_share_counts_once() -> None:
    with python(CHILD) as child:
        assert child.stdout and child.stdout.readline() == "ready\n"
        wait_until_it_sleeps(child.pid)
        got = capture_twice_the_same(child.pid, 1000)
        wait_until_it_sleeps(child.pid)  # it goes on
    assert 8192 + 256 < got.seen < 1.5 * 8192
    assert got.shared == 256
    assert len(got.pages) == 1000
    held = Random(1).randbytes(32 << 20)
    assert sum(page[512:-512] in held for page in got.pages[::50]) > 10
    assert b"tmemfs.." * 512 in got.pages


@needs_root
def test_a_process_that_has_ended_has_no_pages() -> None:
    with python("") as child:
        child.wait()
    with pytest.raises(Refused, match="has ended"):
        capture(child.pid, 10)


@needs_root
def test_a_stage_that_is_interrupted_leaves_nothing() -> None:
    with python(STAGED) as child:
        assert child.stdout
        directory, *pids = child.stdout.readline().split()
        assert Path(directory).is_dir() and all(Path(f"/proc/{pid}").exists() for pid in pids)
        child.send_signal(signal.SIGINT)
        child.wait()
    assert not Path(directory).exists() and not any(Path(f"/proc/{pid}").exists() for pid in pids)
