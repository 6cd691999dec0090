"""`tmemfs upgrade` under load: to the version that runs, to versions that cannot take over, and with processes killed halfway.

A version that cannot take over is a copy of this one with a line changed. It has to be refused, and the one before serves on. Where
a process is killed halfway, either version may serve afterwards, but one has to.
"""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Final

from tools.kills.deaths import Strike
from tools.kills.strikes import ANSWERED_S
from tools.kills.targets import Target
from tools.kills.worker import children_of, end
from tools.soak.places import CHECKOUT, Fault, ended

#: An upgrade takes some seconds: the new interpreter starts, adopts, and is watched for a while.
_LONGEST_PAUSE_S: Final = 4.0


@dataclass(frozen=True, slots=True)
class Change:
    """A line of `file` in the package that is changed, so that this version cannot take over."""

    name: str
    file: str
    pattern: str
    replacement: str


CHANGES: Final = (
    Change("cannot be imported", "worker.py", r"^import os$", "import os, no_such_module"),
    Change("has another layout", "holdings.py", r"^LAYOUT: Final = (\d+)$", r"LAYOUT: Final = 9\1"),
    Change("fails as it starts", "worker.py", r"^    signals = SignalInbox\(\)$", "    raise Refused('this version fails')"),
)
#: What is killed halfway: the worker that served, or any process that the supervisor has started beside it.
WORKER, CANDIDATE = "worker", "candidate"


class Upgrades:
    """The upgrades of a run, in turns; versions that cannot take over are made below `directory`."""

    def __init__(self, directory: Path, random: Random) -> None:
        self._directory = directory
        self._random = random
        kinds = ("", *CHANGES, "", WORKER, CANDIDATE)
        self._kinds: Iterator[str | Change] = cycle(kinds)

    def upgrade(self, target: Target) -> Strike:
        """The next upgrade. Raises Fault, NoWorker, Unanswered."""
        kind = next(self._kinds)
        if isinstance(kind, Change):
            return self._refused(target, kind)
        return self._killed(target, kind) if kind else self._done(target)

    def _done(self, target: Target) -> Strike:
        began_ns = time.monotonic_ns()
        code, said = target.place.command("upgrade", str(target.place.mountpoint))
        if code:
            raise Fault(f"upgrade of {target.place.name} ended with {code}: {said}")
        return _strike(target, "upgraded", began_ns)

    def _refused(self, target: Target, change: Change) -> Strike:
        began_ns = time.monotonic_ns()
        code, said = ended(target.place.start("upgrade", str(target.place.mountpoint), tree=self._tree(change)))
        if code != 2:
            raise Fault(f"upgrade of {target.place.name} to a version that {change.name} ended with {code}: {said}")
        return _strike(target, f"upgrade refused: it {change.name}", began_ns)

    def _killed(self, target: Target, whom: str) -> Strike:
        """Kill a process at a random moment of an upgrade, which may fail then, but has to answer."""
        began_ns, worker = time.monotonic_ns(), int(target.place.flat("stat")["worker_pid"])
        process = target.place.start("upgrade", str(target.place.mountpoint))
        time.sleep(self._random.uniform(0, _LONGEST_PAUSE_S))
        beside = [pid for pid in children_of(target.supervisor) if b"tmemfs.candidate" in _command_line(pid)]
        deaths = 0
        for pid in [worker] if whom == WORKER else beside:
            with suppress(ProcessLookupError):
                deaths += end(target.supervisor, pid, ANSWERED_S, signal.SIGKILL) is not None
        code, _ = ended(process)
        target.counts[f"upgrade with the {whom} killed {'failed' if code else 'done'}"] += 1
        # a candidate is no worker: its death is not one of those that were asked for
        return _strike(target, f"upgrade with the {whom} killed", began_ns, deaths if whom == WORKER else 0)

    def _tree(self, change: Change) -> Path:
        """A copy of this version with the change."""
        tree = self._directory / change.name.replace(" ", "-")
        if not tree.exists():
            shutil.copytree(CHECKOUT / "tmemfs", tree / "tmemfs", ignore=shutil.ignore_patterns("__pycache__"))
            file = tree / "tmemfs" / change.file
            text, count = re.subn(change.pattern, change.replacement, file.read_text(), count=1, flags=re.M)
            if not count:
                raise Fault(f"no line of {change.file} is {change.pattern}")
            file.write_text(text)
        return tree


def _strike(target: Target, phase: str, began_ns: int, deaths: int = 0) -> Strike:
    """Wait until page requests are answered again, by either version; what the wait cost."""
    stall_ns = target.prober.wait_for_stall(began_ns, time.monotonic_ns(), ANSWERED_S)
    target.find_supervisor()
    return Strike(phase, deaths, True, stall_ns / 1e9)


def _command_line(pid: int) -> bytes:
    """The command line of a process, empty if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
