"""A program that is resumed: its parts that need no swap."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from tmemfs.units import MIB
from tools.bench import heap_program
from tools.bench.limited import ProgramFailed
from tools.bench.line_program import LineProgram
from tools.bench.redis_client import RedisClient
from tools.bench.resume import ResumeSizes, swapped_share

STATUS = "Name:\tredis\nVmRSS:\t    3000 kB\nRssAnon:\t    1000 kB\nVmSwap:\t    3000 kB\n"
ANSWER_S = 60.0


class Answers(io.BytesIO):
    """What a server says; what it is told is dropped."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        return len(data)


def heap(base: Path, count: int = 50) -> LineProgram:
    return LineProgram([sys.executable, heap_program.__file__, str(base), str(count), "100"], ANSWER_S)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    file = tmp_path / "base"
    file.write_bytes(os.urandom(8192))
    return file


def test_the_hog_leaves_the_program_less_than_a_tenth_of_what_it_holds() -> None:
    sizes = ResumeSizes.of(240 * MIB, 2.0)
    assert sizes.program_bytes == 840 * MIB and sizes.hog_bytes < sizes.limit_bytes
    assert sizes.limit_bytes - sizes.hog_bytes < sizes.program_bytes / 10
    assert sizes.swap_bytes > 2 * sizes.program_bytes


def test_the_swapped_share_is_of_the_anonymous_memory() -> None:
    assert swapped_share(STATUS) == 0.75
    assert swapped_share("Name:\tnothing\n") == 0


def test_a_program_with_a_heap_answers(base: Path) -> None:
    with heap(base) as program:
        program.ping()
        assert program.digest() == program.digest() == heap_program.digest(heap_program.values(base.read_bytes(), 50, 100))


def test_the_digest_is_of_every_value(base: Path) -> None:
    values = heap_program.values(base.read_bytes(), 50, 100)
    for number in values:
        other = {**values, number: bytes(100)}
        assert heap_program.digest(other) != heap_program.digest(values)


def test_a_program_that_ends_or_says_something_else_is_an_error(tmp_path: Path) -> None:
    for command in (["true"], ["echo", "no"]):
        with pytest.raises(ProgramFailed), LineProgram(command, ANSWER_S):
            pass
    with pytest.raises(ProgramFailed, match="no answer"), LineProgram(["sleep", "60"], 0.01):
        pass
    with pytest.raises(ProgramFailed, match="exit code 0"), LineProgram(["echo", "ready"], ANSWER_S) as program:
        program.process.wait()
        program.digest()


def test_redis_is_asked_for_a_digest_and_must_give_one(base: Path) -> None:
    assert RedisClient(Answers(b"+abc0\r\n"), base.read_bytes(), 10).digest() == "abc0"
    for said in (b"-ERR DEBUG command not allowed\r\n", b""):
        with pytest.raises(EOFError):
            RedisClient(Answers(said), base.read_bytes(), 10).digest()
