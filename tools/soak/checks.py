"""What must hold at any time during a soak: no page lost or wrong, the same daemon, flat memory. Checked after each action."""

from __future__ import annotations

import re

from tools.soak.places import Fault, Place
from tools.soak.plan import SMALL
from tools.soak.summary import Growth, Summary

#: Events that must never happen: each is a page that is lost or wrong.
_NEVER = ("corrupt_records", "read_errors", "damaged_while_cleaning")


class Checks:
    """Checks `places`; notes states and memory in `summary`."""

    def __init__(self, places: dict[str, Place], summary: Summary) -> None:
        self._places = places
        self._summary = summary
        self._growth: dict[str, Growth] = {}

    def check(self, at_s: float) -> int:
        """Check once, at `at_s` of the soak; returns the stores that the daemons refused so far. Raises Fault."""
        refused = self._summary.daemons["stores_refused"]
        for place in self._places.values():
            try:
                stat, events, state = place.flat("stat"), place.flat("events"), place.read("state").splitlines()[0]
            except OSError as error:
                raise Fault(f"the daemon of {place.name} does not answer: {error.strerror}") from None
            self._summary.states[_kind_of(state)] += 1
            refused += int(events["stores_refused"])
            judge_events(place.name, events)
            growth = self._growth.get(place.name)
            if growth is None or growth.pid != int(stat["daemon_pid"]):
                growth = self._growth[place.name] = Growth(int(stat["daemon_pid"]))
            growth.sample(at_s, int(stat["resident_anon"]))
        return refused

    def finish(self) -> None:
        """Judge memory and logs, and add up what the daemons counted."""
        for place in self._places.values():
            self._summary.daemon_ends(place.flat("stat"), place.flat("events"))
        for name, growth in self._growth.items():
            text, is_flat = growth.judge()
            self._summary.memory[name] = text
            if not is_flat:
                self._summary.faults.append(f"the memory of the daemon of {name} grew: {text}")
        for place in self._places.values():
            self._summary.faults += faults_in_log(place.name, place.logs())


def judge_events(name: str, events: dict[str, str]) -> None:
    """Raise Fault for events that must never happen, or only where the file system runs full."""
    bad = [key for key in (*_NEVER, *(() if name == SMALL else ("write_errors",))) if int(events.get(key, "0"))]
    if bad:
        raise Fault(f"{name} counts " + ", ".join(f"{key} {events[key]}" for key in bad))


def faults_in_log(name: str, log: str) -> list[str]:
    """The lines of a log that report a bug, with what follows them."""
    lines = log.splitlines()
    found = [at for at, line in enumerate(lines) if "Traceback" in line or "bug in tmemfs" in line]
    return [f"the log of {name}: " + " / ".join(lines[max(at - 1, 0) : at + 25]) for at in found[:3]]


def _kind_of(state: str) -> str:
    """A state without names and figures, so that states of one kind are counted together; of several reasons the first."""
    words = state.partition(";")[0].split()
    return " ".join("FILE" if word.startswith("/") else re.sub(r"\d+", "N", word) for word in words[:12])
