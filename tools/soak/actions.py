"""What each action does to a place, and which answers are allowed. Any other answer is a fault."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from tools.soak.places import HANG_S, Fault, Place, ended
from tools.soak.plan import Action
from tools.soak.readers import Readers
from tools.soak.summary import Summary

#: The errors that a control file may return while everything runs at once: less was possible than asked for, or nothing now.
_ALLOWED: Final = {
    "shrink": {errno.EAGAIN},
    "compact": {errno.EAGAIN, errno.EBUSY, errno.EINTR},
    "pool.max": {errno.EBUSY, errno.EAGAIN},
    "backing.max": {errno.EBUSY, errno.EAGAIN, errno.ERANGE},
}
_FILL_STEP: Final = 1 << 20
_REST_S: Final = 2.0
#: A `down` may have to move pages to the other swap, which may be full.
_PATIENCE_S: Final = 60.0
_DOWN: Final = {0: "done", 2: "refused", 130: "interrupted"}


class Actions:
    """Performs actions at `places` and counts the answers in `summary`."""

    def __init__(self, places: dict[str, Place], readers: Readers, summary: Summary) -> None:
        self._places = places
        self._readers = readers
        self._answers: Counter[str] = summary.answers
        self._summary = summary
        self._perform: dict[str, Callable[[Place, Action], None]] = {
            "readers": lambda place, action: self._answers.update({"readers started": self._readers.start(place.mountpoint)}),
            "signals": self._signal,
            "commands": self._commands,
            "down": self._down,
            "fill": self._fill,
            "free": self._free,
            "rest": lambda place, action: time.sleep(_REST_S),
        }

    def perform(self, action: Action) -> None:
        """Perform one action. Raises Fault."""
        self._perform.get(action.kind, self._write)(self._places[action.place], action)
        self._summary.actions[action.kind] += 1

    def settle(self) -> None:
        """Free the small backing and lift the limits, so that everything can be verified. Raises Fault."""
        for place in self._places.values():
            # a full backing would have hogs killed in their last verification
            place.filler.unlink(missing_ok=True)
            for name, value in (("backing.max", "max"), ("pressure.mode", "auto")):
                self._write(place, Action("settle", place.name, name, value))

    def _write(self, place: Place, action: Action) -> None:
        try:
            place.write(action.name, action.value)
        except OSError as error:
            number = error.errno or 0
            if number not in _ALLOWED.get(action.name, ()):
                raise Fault(f"{action}: {error.strerror}") from None
            self._answers[f"{action.name} {errno.errorcode[number]}"] += 1

    def _signal(self, place: Place, action: Action) -> None:
        """Send a signal, after which the same daemon has to serve; HUP after the log was renamed, as logrotate does it."""
        pid = int(place.flat("stat")["daemon_pid"])
        if action.name == "HUP":
            self._rotate(place)
        os.kill(pid, getattr(signal, f"SIG{action.name}"))
        if action.name == "HUP":
            _wait(f"SIG{action.name} makes {place.name} open its log again", place.log.exists)
        try:
            now = int(place.flat("stat")["daemon_pid"])
        except OSError as error:
            raise Fault(f"after SIG{action.name} the daemon of {place.name} does not answer: {error.strerror}") from None
        if now != pid:
            raise Fault(f"after SIG{action.name} another daemon serves {place.name}")
        self._answers[f"SIG{action.name} survived"] += 1

    def _rotate(self, place: Place) -> None:
        if place.log.exists():
            place.log.rename(place.log.with_name(f"log.{time.monotonic_ns()}"))

    def _commands(self, place: Place, action: Action) -> None:
        """Run commands at once: some show, some have nothing to do, some must be refused while the image is in use."""
        mountpoint = str(place.mountpoint)
        asked = [
            (("stat", mountpoint, "--json"), {0, 2}),  # 2: no answer in time
            (("up", mountpoint), {0}),
            (("umount", mountpoint), {2}),
            (("stat", mountpoint, "--raw"), {0, 2}),
            (("up", mountpoint), {0}),
        ]
        # in an order that depends on the action, so that a seed repeats it
        random.Random(str(action)).shuffle(asked)
        started = [(place.start(*words), words, allowed) for words, allowed in asked]
        for process, words, allowed in started:
            code, said = ended(process)
            if code not in allowed:
                raise Fault(f"tmemfs {' '.join(words)} ended with {code}: {said}")
            self._answers[f"{words[0]} {'refused' if code else 'done'}"] += 1

    def _down(self, place: Place, action: Action) -> None:
        """Run `down`, which is refused while the hogs' pages fit nowhere else; if it succeeds, turn the swap on again."""
        # their open files would keep it mounted
        self._readers.kill()
        # before the daemon ends, which loses its counters
        last = place.flat("stat"), place.flat("events")
        process = place.start("down", str(place.mountpoint))
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            # as a user would interrupt it
            os.killpg(process.pid, signal.SIGINT)
        code, said = ended(process)
        if code not in _DOWN:
            raise Fault(f"down of {place.name} ended with {code}: {said}")
        if not code:
            self._summary.daemon_ends(*last)
        self._answers[f"down {_DOWN[code]}"] += 1
        place.up()

    def _fill(self, place: Place, action: Action) -> None:
        """Fill the file system of the backing, except for `value`."""
        left = {"0": 0, "2M": 2 << 20, "8M": 8 << 20}[action.value]
        with place.filler.open("ab") as file:
            while (free := _free_bytes(place)) > left:
                try:
                    # in steps: the daemon takes and frees space at the same time
                    at = os.fstat(file.fileno()).st_size
                    os.posix_fallocate(file.fileno(), at, min(free - left, _FILL_STEP))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    break
        self._answers["backing's file system filled"] += 1

    def _free(self, place: Place, action: Action) -> None:
        place.filler.unlink(missing_ok=True)


def _free_bytes(place: Place) -> int:
    space = os.statvfs(place.store)
    return space.f_bavail * space.f_frsize


def _wait(what: str, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_S / 4
    while not happened():
        if time.monotonic() > deadline:
            raise Fault(f"within {HANG_S / 4:.0f} s it did not happen that {what}")
        time.sleep(0.02)
