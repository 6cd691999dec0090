"""A soak: two swaps, one on a file system that runs full, a hog on each that verifies every byte, and everything else at once.

    python -m tools.soak --minutes 20 [--seed N] [--only KIND,...] [--without KIND,...] [--verbose]

A seed, printed at the start, drives what is done. At the end everything is verified and taken down, and nothing may be left.
Exit codes: 0 passed; 1 a fault; 2 it cannot run here. Needs root, loop devices and a memory cgroup controller.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random, SystemRandom
from typing import Final

from tools.cgroup import MemoryCgroup, memory_controller
from tools.interrupts import interruptible
from tools.leftovers import Machine
from tools.soak.actions import Actions
from tools.soak.checks import Checks
from tools.soak.hogs import LIMIT_BYTES, Hog
from tools.soak.places import HANG_S, Fault, Place, places
from tools.soak.plan import KINDS, PLACES, Action, actions, kinds
from tools.soak.readers import Readers
from tools.soak.summary import Summary

_LONGEST_PAUSE_S: Final = 1.0
_SAID_EVERY_S: Final = 60.0
_LAST_ACTIONS: Final = 15


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, print the summary."""
    arguments = _parser().parse_args(argv)
    try:
        chosen = kinds(_words(arguments.only), _words(arguments.without))
    except ValueError as error:
        print(f"tools.soak: {error}", file=sys.stderr)
        return 2
    if os.geteuid() or memory_controller() is None:
        print("tools.soak: needs root and a memory cgroup controller", file=sys.stderr)
        return 2
    summary = Summary(arguments.seed if arguments.seed is not None else SystemRandom().randrange(1 << 32))
    print(f"soak of {arguments.minutes:g} minutes, seed {summary.seed}: {', '.join(chosen)}", flush=True)
    with interruptible("taking everything down"):
        _soak_and_clean(summary, chosen, arguments)
    print("\n".join(summary.lines()), flush=True)
    return 1 if summary.faults else 0


def _soak_and_clean(summary: Summary, chosen: tuple[str, ...], arguments: argparse.Namespace) -> None:
    """Soak in a new directory, and check at the end what is left behind."""
    directory = Path(tempfile.mkdtemp(prefix="tmemfs-soak-", dir=arguments.directory)).resolve()
    # before the first daemon changes any
    machine = Machine(directory, os.getpid())
    before = machine.settings()
    try:
        soak(summary, chosen, 60 * arguments.minutes, directory, arguments.verbose)
    except (Fault, OSError) as error:
        summary.faults.append(f"{type(error).__name__}: {error}")
    finally:
        summary.faults += [f"left behind: {line}" for line in machine.wait(before, HANG_S / 8)]
        shutil.rmtree(directory, ignore_errors=True)


def soak(summary: Summary, chosen: tuple[str, ...], seconds: float, directory: Path, is_verbose: bool) -> None:
    """Run the whole soak and take everything down in any case. Raises Fault."""
    began, readers = time.monotonic(), Readers()
    with places(directory) as both, _hogs(both, summary) as hogs:
        run = Run(summary, both, hogs, readers, is_verbose)
        try:
            run.actions(actions(summary.seed, chosen), began, seconds)
            run.verify(began)
        except BaseException:
            # now: everything is taken down next, and the logs are removed
            print("the last actions: " + "; ".join(map(str, run.last)), file=sys.stderr)
            summary.faults += [f"the daemon's log of {place.name} ends: {place.logs()[-600:]}" for place in both.values()]
            raise
        finally:
            summary.seconds = time.monotonic() - began
            readers.kill()


class Run:
    """The course of one soak."""

    def __init__(self, summary: Summary, both: dict[str, Place], hogs: list[Hog], readers: Readers, is_verbose: bool) -> None:
        self._summary = summary
        self._hogs = hogs
        self._places = both
        self._readers = readers
        self._is_verbose = is_verbose
        self._actions = Actions(both, readers, summary)
        self._checks = Checks(both, summary)
        self._pauses = Random(summary.seed)
        self.last: list[Action] = []

    def actions(self, sequence: Iterator[Action], began: float, seconds: float) -> None:
        """Perform one action after the other until the time is over. Raises Fault."""
        said_at = began
        for hog in self._hogs:
            hog.start(0)
        while (now := time.monotonic()) - began < seconds:
            self.last = [*self.last[1 - _LAST_ACTIONS :], next(sequence)]
            if self._is_verbose:
                print(f"{now - began:7.1f} {self.last[-1]}", flush=True)
            self._actions.perform(self.last[-1])
            self._check(time.monotonic() - began)
            time.sleep(self._pauses.uniform(0, _LONGEST_PAUSE_S))
            if now - said_at > _SAID_EVERY_S:
                said_at = now
                print(f"{(now - began) / 60:.0f} min: {self._summary.actions.total()} actions", flush=True)

    def verify(self, began: float) -> None:
        """Stop the actions, have the hogs verify all their pages, and judge the rest. Raises Fault."""
        self._actions.settle()
        steps, faults = self._readers.ended(HANG_S)
        self._summary.answers["readers' steps"] += steps
        self._summary.faults += faults
        refused = self._check(time.monotonic() - began)
        for hog in self._hogs:
            hog.stop(refused)
        self._check(time.monotonic() - began)
        self._checks.finish()
        for place in self._places.values():
            code, said = place.command("down", str(place.mountpoint))
            if code:
                self._summary.faults.append(f"down of {place.name} at the end ended with {code}: {said}")

    def _check(self, at_s: float) -> int:
        refused = self._checks.check(at_s)
        for hog in self._hogs:
            hog.check(refused)
        steps, faults = self._readers.ended()
        self._summary.answers["readers' steps"] += steps
        if faults:
            raise Fault("; ".join(faults))
        return refused


@contextmanager
def _hogs(both: dict[str, Place], summary: Summary) -> Iterator[list[Hog]]:
    """One hog per place, each in a cgroup of its own; killed at the end."""
    small, ordinary = PLACES
    with MemoryCgroup(f"soak-{small}", LIMIT_BYTES) as first, MemoryCgroup(f"soak-{ordinary}", LIMIT_BYTES) as second:
        hogs = [
            Hog(name, cgroup, both[name].directory, summary.seed % 1000 + 1000 * at, summary.hogs)
            for at, (name, cgroup) in enumerate(((small, first), (ordinary, second)))
        ]
        try:
            yield hogs
        finally:
            for hog in hogs:
                hog.kill()


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, help="choose the actions (a random seed, which is printed)")
    parser.add_argument("--only", default="", metavar="KIND,...", help=f"only these actions: {', '.join(KINDS)}")
    parser.add_argument("--without", default="", metavar="KIND,...", help="leave these actions out")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="where to put everything (/var/tmp)")
    parser.add_argument("--verbose", action="store_true", help="print every action")
    return parser


if __name__ == "__main__":
    sys.exit(main())
