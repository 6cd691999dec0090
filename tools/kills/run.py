"""The course of one run: strikes one after the other at random moments, and what is judged at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Final

from tmemfs.system import swapdev
from tmemfs.units import parse_seconds
from tools.kills.deaths import COUNTED, Strike, Tally
from tools.kills.load import Load
from tools.kills.phases import PHASES, RECOVERING
from tools.kills.prober import VerifiedWrites
from tools.kills.strikes import kill, kill_twice, stop
from tools.kills.targets import Target, run, unmount
from tools.kills.upgrades import Upgrades
from tools.soak.checks import faults_in_log, judge_events
from tools.soak.places import HANG_S, Fault, Place

#: How much later than its time the watchdog may act, with the machine under load.
_WATCHDOG_LATE_S: Final = 30.0
_LONGEST_PAUSE_S: Final = 1.0
_SAID_EVERY_S: Final = 60.0
_RUNNING_S: Final = 60.0
#: A load that has not swapped yet has nothing to lose.
_LOADED_PAGES: Final = 30_000
_POLL_S: Final = 0.1
#: The limit for a command that must not wait for the worker.
_STAT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How often what happens."""

    kills: int
    stops: int
    upgrades: int
    watchdog: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.kills} kills, {self.stops} stops, {self.upgrades} upgrades, {self.seconds:g} s without any"


class Run:
    """Strikes at `targets` under a load."""

    def __init__(self, plan: Plan, tally: Tally, targets: Sequence[Target], load: Load, random: Random, directory: Path) -> None:
        self._plan = plan
        self._tally = tally
        self._targets = targets
        self._load = load
        self._random = random
        self._upgrades = Upgrades(directory, random)
        self._said_at = time.monotonic()

    def all(self) -> None:
        """Carry out the plan, and have the load verify what it has. Raises Fault, Unanswered, NoWorker, OSError."""
        plan = self._plan
        self._load.start()
        self._wait_loaded()
        with ExitStack() as stack:
            for at, target in enumerate(self._targets):
                stack.enter_context(target.requests(self._tally.seed + at))
            self._rest(plan.seconds)
            self._repeat(plan.kills, self._kill)
            for target in self._targets if plan.stops else ():
                target.request("watchdog", plan.watchdog)
            self._repeat(plan.stops, self._stop)
            self._repeat(plan.upgrades, self._upgrades.upgrade)
        for target in self._targets:
            target.settle()
        self._load.stop()

    def _repeat(self, count: int, strike: Callable[[Target], Strike]) -> None:
        """Strike at random moments until `count` workers have died, or as many upgrades were done."""
        done = 0
        while done < count:
            time.sleep(self._random.uniform(0, _LONGEST_PAUSE_S))
            self._tally.strikes.append(strike(self._random.choice(self._targets)))
            done += max(self._tally.strikes[-1].deaths, 1)
            self._check()

    def _kill(self, target: Target) -> Strike:
        """Kill the worker in a phase of it, or the worker and the next one."""
        phase = self._random.choice(PHASES)
        if phase is RECOVERING:
            return kill_twice(target.supervisor, target.prober, phase.name, self._random)
        is_seen = target.wait_for(phase)
        return kill(target.supervisor, target.prober, phase.name, is_seen)

    def _stop(self, target: Target) -> Strike:
        """Stop the worker, ask for its state meanwhile, and wait until the watchdog has replaced it."""
        limit_s = parse_seconds(self._plan.watchdog) + _WATCHDOG_LATE_S
        return stop(target.supervisor, target.prober, limit_s, partial(self._ask_for_state, target))

    def _ask_for_state(self, target: Target) -> None:
        began = time.monotonic()
        code, said = target.place.command("stat", str(target.place.mountpoint))
        took_s = time.monotonic() - began
        self._tally.requests[f"stat of a stopped worker, exit code {code}"] += 1
        if took_s > _STAT_S:
            raise Fault(f"stat of a stopped worker took {took_s:.1f} s: {said}")

    def _wait_loaded(self) -> None:
        """Wait until each target stores enough to have something to lose."""
        deadline = time.monotonic() + HANG_S
        while any(int(target.place.flat("stat")["stores"]) < _LOADED_PAGES for target in self._targets):
            self._check()
            if time.monotonic() > deadline:
                raise Fault(f"the load swapped nothing within {HANG_S:.0f} s")
            time.sleep(_POLL_S)

    def _rest(self, seconds: float) -> None:
        """Go on without strikes."""
        end_at = time.monotonic() + seconds
        while time.monotonic() < end_at:
            self._check()
            time.sleep(_POLL_S)

    def _check(self) -> None:
        """Raise Fault, or Unanswered, if anything went wrong so far; print the progress now and then."""
        self._load.check()
        for target in self._targets:
            target.check()
            judge_events(target.place.name, target.place.flat("events"))
        if time.monotonic() - self._said_at > _SAID_EVERY_S:
            self._said_at = time.monotonic()
            print(f"{self._tally.deaths} deaths", flush=True)


def finish(tally: Tally, targets: Sequence[Target], files: Path) -> None:
    """Verify what is left to verify, judge states, events and logs, and take both down as a user does. Raises Fault, Unanswered."""
    for target in targets:
        target.prober.stop()
        target.prober.check()
        tally.verified[f"page requests of the prober of {target.place.name}"] = target.prober.count
        if isinstance(target.pages, VerifiedWrites):
            target.pages.verify_all()
            tally.verified["pages of the prober"] = target.pages.verified
        _wait_running(target.place)
        judge_events(target.place.name, target.place.flat("events"))
        stat = target.place.flat("stat")
        tally.supervisors.update({key: int(stat[key]) for key in COUNTED})
        target.pages.close()
    tally.faults += tally.miscounted()
    unmount(files)
    run("e2fsck", "-f", "-n", targets[-1].device)
    for target in targets:
        swapdev.detach(target.device) if target is targets[-1] else None
        code, said = target.place.command("down", str(target.place.mountpoint))
        if code:
            raise Fault(f"down of {target.place.name} ended with {code}: {said}")
        tally.faults += faults_in_log(target.place.name, target.place.logs())


def _wait_running(place: Place) -> None:
    deadline = time.monotonic() + _RUNNING_S
    while (state := place.read("state").splitlines()[0]) != "running":
        if time.monotonic() > deadline:
            raise Fault(f"the state of {place.name} is still {state!r} after {_RUNNING_S:.0f} s")
        time.sleep(_POLL_S)
