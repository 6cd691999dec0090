"""The process whose memory is swapped (toucher.c): started in a cgroup, given commands, asked for its times, always ended.

Each answer has a time limit. A wrong page ends the benchmark: no figure of a run with a wrong byte is worth keeping.
"""

from __future__ import annotations

import os
import select
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Final

from tmemfs.cli.real_pages import heap_pages
from tools.bench.child import Child
from tools.bench.native import TOUCHER, compiled
from tools.cgroup import MemoryCgroup

_ANSWER_S: Final = 240.0
_TIME_BYTES: Final = 4


class WrongBytes(Exception):
    """A page was read with other content than was written."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a command: its figures, and if it touches pages, the time of each touch in nanoseconds."""

    figures: dict[str, int]
    times_ns: array[int] = field(default_factory=lambda: array("I"))


def parse_answer(line: str) -> dict[str, int]:
    """`key value` pairs."""
    words = line.split()
    return {key: int(value) for key, value in zip(words[::2], words[1::2], strict=True)}


def write_base(file: Path) -> None:
    """Write the pages that all contenders swap: those of RealPages, before they are stamped."""
    pages = heap_pages()
    Random(1).shuffle(pages)
    file.write_bytes(b"".join(pages))


class Toucher(Child):
    """`count` pages of memory in `cgroup`."""

    def __init__(self, base: Path, count: int, seed: int, cgroup: MemoryCgroup) -> None:
        super().__init__([str(compiled(TOUCHER)), str(base), str(count), str(seed), str(cgroup.tasks)])
        self.count = count

    def __enter__(self) -> Toucher:
        try:
            self._answer()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def ask(self, command: str) -> Answer:
        """Send `command` and return the answer. Raises WrongBytes, TimeoutError."""
        self.tell(command)
        return self.wait()

    def tell(self, command: str) -> None:
        """Send `command`, without waiting for the answer."""
        assert self.process.stdin
        self.process.stdin.write(command.encode() + b"\n")

    def wait(self) -> Answer:
        """The answer to the last command. Raises WrongBytes, TimeoutError."""
        answer = self._answer()
        if wrong := answer.figures.get("wrong", 0):
            raise WrongBytes(f"{wrong} of {answer.figures['touches']} pages came back wrong")
        return answer

    def _answer(self) -> Answer:
        deadline = time.monotonic() + _ANSWER_S
        while b"\n" not in self.pending:
            self._read(deadline)
        line, _, self.pending = self.pending.partition(b"\n")
        figures = parse_answer(line.decode())
        wanted = figures.pop("samples", 0) * _TIME_BYTES
        while len(self.pending) < wanted:
            self._read(deadline)
        times, self.pending = self.pending[:wanted], self.pending[wanted:]
        return Answer(figures, array("I", times))

    def _read(self, deadline: float) -> None:
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], max(deadline - time.monotonic(), 0))[0]:
            raise TimeoutError(f"the toucher has not answered for {_ANSWER_S:.0f} s")
        some = os.read(self.process.stdout.fileno(), 1 << 20)
        if not some:
            raise EOFError(f"the toucher ended with exit code {self.process.wait()}: killed for a page that could not be read?")
        self.pending += some


@dataclass(frozen=True, slots=True)
class Herd:
    """Touchers in one cgroup."""

    members: list[Toucher]
    cgroup: MemoryCgroup

    @property
    def pids(self) -> tuple[int, ...]:
        """The numbers of all processes."""
        return tuple(member.pid for member in self.members)

    def fill(self, first: int, count: int) -> int:
        """Write pages of each process, one process after the other; returns nanoseconds."""
        return sum(member.ask(f"fill {first} {count}").figures["ns"] for member in self.members)

    def page_out(self) -> None:
        """Swap out everything and empty the kernel's swap cache, so that each touch is a fault that reads."""
        for member in self.members:
            member.ask("pageout")
        self.cgroup.reclaim()

    def touch(self, order: str, count: int, seed: int, pause_us: int = 0) -> list[Answer]:
        """Touch `count` swapped-out pages in total, all processes at once, each with a pause between two touches."""
        # all are told before the first is waited for, so that they touch at the same time
        for member in self.members:
            member.tell(f"touch {order} {count // len(self.members)} {seed} {pause_us}")
        return [member.wait() for member in self.members]


@contextmanager
def herd(base: Path, count: int, limit_bytes: int, processes: int = 1) -> Iterator[Herd]:
    """`processes` touchers with `count` pages in total, in one cgroup of `limit_bytes`, which is emptied before it is removed."""
    with ExitStack() as stack:
        cgroup = stack.enter_context(MemoryCgroup("bench", limit_bytes))
        stack.callback(cgroup.reclaim)
        yield Herd([stack.enter_context(Toucher(base, count // processes, seed + 1, cgroup)) for seed in range(processes)], cgroup)
