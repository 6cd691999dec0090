"""What a scenario finds in a guest: the machine with its contender, and the hogs that it may start."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.vm.contenders import Contender, unprotected
from tools.vm.evidence import Figure, Verdict

HOGS: Final = Path(__file__).with_name("hogs.py")
#: A hog that takes longer is stuck, even in an emulated machine.
FILLED_S: Final = 120.0
VERIFIED_S: Final = 240.0


@dataclass(frozen=True, slots=True)
class Guest:
    """The machine that a scenario runs on."""

    contender: Contender
    results: Path
    full: bool
    ram_bytes: int
    say: Callable[[str], None]

    def log(self) -> str:
        """The kernel's log since boot."""
        return subprocess.run(["dmesg"], capture_output=True, text=True, timeout=60, check=False).stdout

    def daemon_pid(self) -> int | None:
        """The process of the contender that holds it, if it has one."""
        pid = self.contender.stat().get("daemon_pid")
        return int(pid) if pid else None

    def daemons(self) -> list[int]:
        """All processes of the contender: the supervisor and its worker."""
        stat = self.contender.stat()
        return [int(stat[key]) for key in ("daemon_pid", "worker_pid") if key in stat]

    def verdict(self, scenario: str, figures: dict[str, Figure], reasons: list[str]) -> Verdict:
        """A verdict on this guest's contender."""
        return Verdict(scenario, self.contender.name, figures, tuple(reasons))


class Hog:
    """A running program of hogs.py: what it printed, and how to tell it to go on."""

    def __init__(self, *arguments: str) -> None:
        command = unprotected([sys.executable, "-I", "-S", str(HOGS), *arguments])
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._buffer = b""
        self.said: dict[str, str] = {}

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def wait_for(self, key: str, seconds: float) -> str | None:
        """The next value that it prints for `key`; None if it ends or takes longer."""
        deadline = time.monotonic() + seconds
        assert self._process.stdout is not None
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                name, _, value = line.decode().partition(" ")
                self.said[name] = value
                if name == key:
                    return value
                continue
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                return None
            more = os.read(self._process.stdout.fileno(), 65536)
            if not more:
                return None
            self._buffer += more

    def tell(self) -> bool:
        """Send it a line; whether it still runs."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"\n")
        except OSError:
            return False
        return True

    def wait(self, seconds: float) -> int | None:
        """Its exit code, negative if a signal ended it; None if it still runs."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        """Kill it, if it still runs."""
        self._process.kill()
        self.wait(60)


@contextmanager
def hogs_ended() -> Iterator[list[Hog]]:
    """A list for hogs, which are ended at the end of the block."""
    running: list[Hog] = []
    try:
        yield running
    finally:
        for hog in running:
            hog.end()
