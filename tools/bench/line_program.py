"""A program that answers one line per line: started, asked within a time limit, always ended."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

from tools.bench.limited import ProgramFailed


class LineProgram:
    """`command`, which says `ready` once it answers. Raises ProgramFailed for no or another answer."""

    def __init__(self, command: Sequence[str], answer_s: float) -> None:
        self._command = command
        self._answer_s = answer_s
        self._pending = b""

    def __enter__(self) -> LineProgram:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        try:
            self._expect("ready")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def ping(self) -> None:
        """Ask for something small."""
        self._tell("ping")
        self._expect("pong")

    def digest(self) -> str:
        """Ask for a checksum of everything it holds."""
        self._tell("digest")
        return self._line()

    def _tell(self, word: str) -> None:
        assert self._process.stdin
        # if it has ended, the missing answer says more
        with suppress(BrokenPipeError):
            self._process.stdin.write(word.encode() + b"\n")

    def _expect(self, word: str) -> None:
        if (said := self._line()) != word:
            raise ProgramFailed(f"{self._command[-4:]} said {said!r}, not {word!r}")

    def _line(self) -> str:
        assert self._process.stdout
        deadline = time.monotonic() + self._answer_s
        while b"\n" not in self._pending:
            if not select.select([self._process.stdout], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise ProgramFailed(f"no answer for {self._answer_s:.0f} s")
            some = os.read(self._process.stdout.fileno(), 4096)
            if not some:
                raise ProgramFailed(f"the program ended with exit code {self._process.wait()}")
            self._pending += some
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()

    def _end(self) -> None:
        # SIGKILL: it may be waiting for a page that never comes
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
