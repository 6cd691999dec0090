"""Deaths: why workers died, and what they died of, as their supervisor judges it from their words in the status region."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Final

from tmemfs.fuse.handling import IDLE
from tmemfs.fuse.wire import RESENT
from tmemfs.system.status_region import HAS_ANSWERED, Cause, Death, StatusRegion, Word

#: So many workers that answered nothing, within the time, and no other is forked.
MOST_DEATHS_IN_A_ROW: Final = 5
_WITHIN_S: Final = 60.0


class Deaths:
    """Of workers that ended otherwise than by an unmount; counted in `status`."""

    def __init__(self, status: StatusRegion) -> None:
        self._status = status
        self._words = status.words
        self._suspects: dict[int, int] = {}
        # when those died that answered nothing
        self._fruitless: list[float] = []

    @property
    def suspects(self) -> Mapping[int, int]:
        """How many workers died of which request."""
        return self._suspects

    @property
    def in_a_row(self) -> int:
        """How many have died that answered nothing."""
        return len(self._fruitless)

    @property
    def are_too_many(self) -> bool:
        """Whether another worker would not serve either."""
        return len(self._fruitless) >= MOST_DEATHS_IN_A_ROW

    def note(self, worker: int, wait_status: int, hung: str, last_said: str, has_unread: bool) -> None:
        """Count why process `worker` died, and what of. `hung`: why it was killed, if it was by its supervisor.

        `last_said` is its own reason, if it gave one; `has_unread`: the kernel has requests that were not read.
        """
        is_killed = os.WIFSIGNALED(wait_status) and os.WTERMSIG(wait_status) == signal.SIGKILL and not hung
        how = f"was killed, as {hung}" if hung else why(wait_status)
        said = f"worker {self._words[Word.GENERATION]} (process {worker}) {how}" + (f": {last_said}" if last_said else "")
        cause = Cause.HUNG if hung else Cause.KILLED if is_killed else Cause.CRASHED
        self._status.add_death(Death(time.monotonic_ns(), cause, said))
        handled = self._status.handling()
        if not is_killed:  # a kill from outside says nothing about the request
            for unique in {word & ~RESENT for word in handled if word and not word & IDLE}:
                self._suspects[unique] = self._suspects.get(unique, 0) + 1
        self._note_fruitless(handled, is_killed, has_unread)

    def _note_fruitless(self, handled: tuple[int, ...], is_killed: bool, has_unread: bool) -> None:
        """Remember the death of a worker that answered nothing, unless it was killed with nothing to answer.

        One that answered makes up for all.
        """
        now = time.monotonic()
        if self._words[HAS_ANSWERED]:
            self._fruitless.clear()
            return
        had_requests = has_unread or any(word and not word & IDLE for word in handled)
        if not is_killed or not self._words[Word.IS_SERVING] or had_requests:
            self._fruitless = [at for at in self._fruitless if now - at < _WITHIN_S] + [now]


def why(wait_status: int) -> str:
    """How a process with this wait status ended."""
    if os.WIFSIGNALED(wait_status):
        return f"was ended by {signal.Signals(os.WTERMSIG(wait_status)).name}"
    return f"ended with {os.WEXITSTATUS(wait_status)}"
