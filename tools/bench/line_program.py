"""A program that answers one line per line: started, asked within a time limit, always ended."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

from tools.bench.child import Child
from tools.bench.limited import ProgramFailed


class LineProgram(Child):
    """`command`, which says `ready` once it answers. Raises ProgramFailed for no or another answer."""

    def __init__(self, command: Sequence[str], answer_s: float) -> None:
        super().__init__(command)
        self._command = command
        self._answer_s = answer_s

    def __enter__(self) -> LineProgram:
        try:
            self._expect("ready")
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def ping(self) -> None:
        """Ask for something small."""
        self._tell("ping")
        self._expect("pong")

    def digest(self) -> str:
        """Ask for a checksum of everything it holds."""
        self._tell("digest")
        return self._line()

    def _tell(self, word: str) -> None:
        assert self.process.stdin
        # if it has ended, the missing answer says more
        with suppress(BrokenPipeError):
            self.process.stdin.write(word.encode() + b"\n")

    def _expect(self, word: str) -> None:
        if (said := self._line()) != word:
            raise ProgramFailed(f"{self._command[-4:]} said {said!r}, not {word!r}")

    def _line(self) -> str:
        assert self.process.stdout
        deadline = time.monotonic() + self._answer_s
        while b"\n" not in self.pending:
            if not select.select([self.process.stdout], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise ProgramFailed(f"no answer for {self._answer_s:.0f} s")
            some = os.read(self.process.stdout.fileno(), 4096)
            if not some:
                raise ProgramFailed(f"the program ended with exit code {self.process.wait()}")
            self.pending += some
        line, _, self.pending = self.pending.partition(b"\n")
        return line.decode()
