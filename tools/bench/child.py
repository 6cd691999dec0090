"""A program behind two pipes, started here and always ended."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence


class Child:
    """The process of `command`; `pending` is what it has said and nobody has taken yet."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.pending = b""

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self.process.pid

    def end(self) -> None:
        """End it, and close the pipes."""
        # SIGKILL: it may be waiting for a page that never comes
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()
