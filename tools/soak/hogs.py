"""The hogs of a soak: programs that verify every byte of their memory, each in a memory cgroup with a third of that.

A hog that the kernel killed is started again. A kill is allowed only if a store was full during the hog's life: its pages then fit
neither in its cgroup nor in a swap.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from tmemfs.units import MIB
from tools.cgroup import MemoryCgroup
from tools.interrupts import usual_signals
from tools.soak.places import HANG_S, Fault

LIMIT_BYTES: Final = 48 * MIB
_SIZE: Final = "128M"
_SHARE: Final = "0.2"
_PROGRAM: Final = str(Path(__file__).parents[1] / "hog.py")


@dataclass(slots=True)
class _Run:
    """One life of a hog."""

    process: subprocess.Popen[bytes]
    said: IO[bytes]
    #: Refused stores when it started.
    refused: int

    def tell(self) -> None:
        """Ask it to end after its current round."""
        if self.process.stdin is not None:
            self.process.stdin.close()

    def close(self) -> None:
        """Close the files after it has ended."""
        self.tell()
        self.said.close()


class Hog:
    """A hog of `size` in `cgroup` that reports to a file in `directory`; what it did is added to `counts`."""

    def __init__(
        self, name: str, cgroup: MemoryCgroup, directory: Path, seed: int, counts: Counter[str], size: str = _SIZE
    ) -> None:
        self._name = name
        self._size = size
        self._cgroup = cgroup
        self._directory = directory
        self._seed = seed
        self._counts = counts
        self._run: _Run | None = None

    def start(self, refused: int) -> None:
        """Start the hog; `refused` stores were refused so far."""
        # other pages and another order in each life
        self._seed += 1
        command = [sys.executable, _PROGRAM, "--size", self._size, "--churn", _SHARE, "--seed", str(self._seed)]
        said = (self._directory / f"hog-{self._name}").open("w+b")
        process = subprocess.Popen(
            [*command, "--tasks", str(self._cgroup.tasks)],
            stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT, preexec_fn=usual_signals,
        )  # fmt: skip
        self._run = _Run(process, said, refused)
        self._counts["started"] += 1

    def check(self, refused: int) -> None:
        """Start it again if it was killed and that is allowed. Raises Fault if it ended in any other way."""
        run = self._run
        if run is None or run.process.poll() is None:
            return
        self._ends(run, refused)
        self.start(refused)

    def stop(self, refused: int) -> None:
        """Have it verify everything once more and end. Raises Fault."""
        run = self._run
        if run is None:
            return
        run.tell()
        try:
            run.process.wait(2 * HANG_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Fault(f"the hog {self._name} did not end within {2 * HANG_S:.0f} s") from None
        self._ends(run, refused)

    def kill(self) -> None:
        """End it at once."""
        if self._run is not None:
            self._run.process.kill()
            self._run.process.wait()
            self._run.close()
            self._run = None

    def _ends(self, run: _Run, refused: int) -> None:
        """Count what it did in this life, and judge how it ended."""
        self._run = None
        run.said.seek(0)
        lines = run.said.read().decode(errors="replace").splitlines()
        run.close()
        rest = count_rounds(lines, self._counts)
        code = run.process.returncode
        # the only kill that is allowed: see the module's docstring
        if code == -signal.SIGKILL and refused > run.refused:
            self._counts["killed where a store was full"] += 1
        elif code:
            raise Fault(f"the hog {self._name} ended with {_named(code)}: {' '.join(rest) or 'it said nothing'}"[:500])


def count_rounds(lines: list[str], counts: Counter[str]) -> list[str]:
    """Add what the rounds of a hog did to `counts`; returns the other lines. A hog that is killed may leave half a line."""
    rest = list[str]()
    for line in lines:
        try:
            done: dict[str, int] = json.loads(line)
        except ValueError:
            rest.append(line)
            continue
        counts["rounds"] += 1
        counts.update({f"pages {what}": count for what, count in done.items()})
    return rest


def _named(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
