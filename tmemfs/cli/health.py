"""The health of a mount's worker, by the status region of its supervisor: what can be known without asking the mount.

A mount whose worker is stopped or hangs answers nothing, and a command that asks it waits as long. The region is a file in
/run/tmemfs.d, which only root may read (system/status_region.py). Here it becomes sentences.

Knows neither control files nor swap.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tmemfs.errors import NoAnswer, Refused
from tmemfs.system import runtime
from tmemfs.system.proctext import parse_process
from tmemfs.system.status_region import Cause, Death, State, Status, Word, read_status
from tmemfs.units import PAGE_BYTES, format_size

#: A worker beats every two seconds. One that computes or waits for memory may be late.
_LATE_S: Final = 5.0
#: The supervisor looks every 5 seconds at least.
_LOOKS_S: Final = 10.0
_SAID_DEATHS: Final = 3
_STOPPED: Final = ("T", "t")


@dataclass(frozen=True, slots=True)
class Health:
    """What a status region said at `now_ns`, and the letter of the worker's state in /proc, '' if it has ended."""

    status: Status
    now_ns: int
    letter: str

    @property
    def has_given_up(self) -> bool:
        """Whether the supervisor forks no worker any more."""
        return self.status.state == State.GAVE_UP

    @property
    def is_stopped(self) -> bool:
        """Whether the worker is stopped, by a signal or a debugger."""
        return self.letter in _STOPPED

    @property
    def is_silent(self) -> bool:
        """Whether the worker seems not to answer."""
        serves = self.status.worker != 0 and self.status.words[Word.IS_SERVING] != 0
        return self.is_stopped or (serves and (self._pulse_s > _LATE_S or self._unanswered_s > _LOOKS_S))

    @property
    def why(self) -> str:
        """Why the mount does not answer."""
        status = self.status
        if self.has_given_up:
            return f"workers died one after the other, and none is started any more: the mount answers errors{self._last_death}"
        who = f"worker {status.worker} (generation {status.generation})"
        if not status.worker:
            return f"a worker is being started (generation {status.generation}){self._last_death}"
        if not status.words[Word.IS_SERVING] and not self.is_stopped:
            return f"{who} has been starting for {_duration(self._since(Word.STARTED_NS))}{self._last_death}"
        if not self.is_silent:
            return f"{who} is late with its answer"
        return f"{who} has not answered for {_duration(self._silent_s)}: {self._reason}; {self._next_step}"

    def rows(self, show: Callable[[int], str] = format_size) -> list[tuple[str, str]]:
        """The lines that matter to a person, by the last pulse."""
        words = self.status.words
        stored, compressed = words[Word.PAGES_STORED] * PAGE_BYTES, words[Word.COMPRESSED_BYTES]
        ratio = f" (ratio {stored / compressed:.2f})" if compressed else ""
        return [
            ("state", self.why),
            ("figures", f"of {_duration(self._pulse_s)} ago" if words[Word.PULSE] else "none yet"),
            ("swapped out", show(stored)),
            ("compressed", f"{show(compressed)}{ratio}"),
            ("pool", show(words[Word.POOL_BYTES])),
            ("backing", show(words[Word.TIER_BYTES])),
            ("restarts", self.restarts),
            *(("", self._told(death)) for death in self.status.deaths[-_SAID_DEATHS:]),
        ]

    @property
    def restarts(self) -> str:
        """How often workers were replaced, by cause."""
        counts = {cause: self.status.words[cause.counter] for cause in Cause}
        causes = ", ".join(f"{count} {cause.name.lower()}" for cause, count in counts.items() if count)
        return f"{sum(counts.values())} ({causes})" if causes else "none"

    @property
    def serves(self) -> str:
        """Who serves, and how often that was replaced."""
        words, replaced = self.status.words, f"; workers replaced: {self.restarts}" if self.status.words[Word.DEATHS] else ""
        return (
            f"process {self.status.worker} serves for {words[Word.SUPERVISOR_PID]} (generation {words[Word.GENERATION]}){replaced}"
        )

    def refuse_if_silent(self) -> None:
        """Raise NoAnswer if the mount cannot be expected to answer."""
        if self.is_silent or self.has_given_up:
            raise NoAnswer(f"the mount does not answer: {self.why}")

    def end_worker(self) -> None:
        """Kill the worker. The supervisor replaces it, and no page is lost."""
        # by way of a descriptor: a process that takes the number meanwhile is not killed
        with suppress(OSError):
            process = os.pidfd_open(self.status.worker)
            try:
                if _parent(self.status.worker) == self.status.supervisor:
                    signal.pidfd_send_signal(process, signal.SIGKILL)
            finally:
                os.close(process)

    # ---- in seconds and in words -----------------------------------------------------------------------------------

    def _since(self, word: Word) -> float:
        """Seconds since the moment in `word`; none if that is not known."""
        return max(self.now_ns - self.status.words[word], 0) / 1e9 if self.status.words[word] else 0.0

    @property
    def _pulse_s(self) -> float:
        # that of a worker which has not beaten yet is the last one's
        return min(self._since(Word.PULSE_NS), self._since(Word.STARTED_NS))

    @property
    def _unanswered_s(self) -> float:
        return self._since(Word.ANSWERED_NS)

    @property
    def _silent_s(self) -> float:
        is_late = self.is_stopped or self._pulse_s > _LATE_S
        return max(self._pulse_s, self._unanswered_s if self._unanswered_s > _LOOKS_S else 0) if is_late else self._unanswered_s

    @property
    def _waits_for_tier(self) -> bool:
        words = self.status.words
        return words[Word.TIER_BEGUN] != words[Word.TIER_ENDED] and self._pulse_s <= _LATE_S

    @property
    def _reason(self) -> str:
        if self.is_stopped:
            return "it is stopped"
        return "it waits for the backing" if self._waits_for_tier else "it hangs"

    @property
    def _next_step(self) -> str:
        if self._waits_for_tier and not self.is_stopped:
            return "the watchdog leaves it alone"
        if not self.status.watchdog_s:
            return f"the watchdog is off: 'kill -9 {self.status.worker}' has it replaced"
        return f"the watchdog replaces it once requests have waited for {_duration(self.status.watchdog_s)}"

    @property
    def _last_death(self) -> str:
        return "".join(f"; {self._told(death)}" for death in self.status.deaths[-1:])

    def _told(self, death: Death) -> str:
        return f"{death.said}, {_duration(max(self.now_ns - death.at_ns, 0) / 1e9)} ago"


def look(mountpoint: Path) -> Health | None:
    """The health of the worker of `mountpoint`, as it is recorded; None if nobody says anything. Raises OSError, Refused."""
    status = read_status(runtime.status_path(mountpoint))
    if status is None or runtime.process_started(status.supervisor) is None:
        return None
    return Health(status, time.monotonic_ns(), _letter(status.worker))


class Attendant:
    """Watches over the worker of `mountpoint` while a command waits for it, and says on `say` once why a worker does not answer.

    `may_kill`: such a worker is killed, so that another one answers.
    """

    def __init__(self, mountpoint: Path, may_kill: bool, say: Callable[[str], None]) -> None:
        self._mountpoint = mountpoint
        self._may_kill = may_kill
        self._say = say
        self._said_of = 0

    def attend(self) -> None:
        """Look once."""
        with suppress(OSError, Refused):
            health = look(self._mountpoint)
            if health and health.is_silent:
                self._note(health)

    def _note(self, health: Health) -> None:
        worker = health.status.worker
        if worker != self._said_of:
            self._said_of = worker
            self._say(f"{health.why}; {'it is killed' if self._may_kill else 'waiting for it'}")
        if self._may_kill:
            health.end_worker()


def _letter(pid: int) -> str:
    """The letter of the state of process `pid`."""
    try:
        return parse_process(Path(f"/proc/{pid}/stat").read_bytes()).state
    except OSError:
        return ""


def _parent(pid: int) -> int:
    return parse_process(Path(f"/proc/{pid}/stat").read_bytes()).parent


def _duration(seconds: float) -> str:
    """Seconds, minutes or hours for people."""
    for most, unit, each in ((120, "s", 1), (7200, "min", 60)):
        if seconds < most:
            return f"{seconds / each:.3g} {unit}" if seconds < 1 else f"{seconds / each:.0f} {unit}"
    return f"{seconds / 3600:.0f} h"
