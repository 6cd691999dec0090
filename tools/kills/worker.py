"""The worker of a supervisor, seen from outside: which process it is, and its end by a signal.

The status region names the worker; the supervisor's other child is a spare, or a candidate of an upgrade. A signal is sent through
a pidfd whose process was then still a child of the supervisor, so a process id that was used again is never hit. Reads files only,
and needs neither the mount nor an answer of the supervisor.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tmemfs.system import runtime
from tmemfs.system.status_region import read_status

#: Between two looks for a new worker: short beside its recovery, which takes milliseconds.
_POLL_S: Final = 0.0005


class NoWorker(Exception):
    """A supervisor has no worker, or its worker does not end."""


@dataclass(frozen=True, slots=True)
class Death:
    """A worker that a signal ended: when the signal was sent, and when no thread of it was left. Times of time.monotonic_ns."""

    pid: int
    sent_ns: int
    ended_ns: int


def children_of(pid: int) -> list[int]:
    """The children of all threads of process `pid`, none if it has ended."""
    found = list[int]()
    for task in sorted(Path(f"/proc/{pid}/task").glob("[0-9]*")):
        with suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    return found


def named_by(supervisor: int) -> int:
    """The worker that the status region of `supervisor` names, 0 while there is none."""
    for path in runtime.DIRECTORY.glob("*.status"):
        status = read_status(path)
        if status is not None and status.supervisor == supervisor:
            return status.worker
    return 0


def worker_of(supervisor: int, limit_s: float, other_than: int | None = None) -> int:
    """The worker of `supervisor`, as soon as there is one. Raises NoWorker after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while True:
        # one that has ended is named until the supervisor has waited for it
        worker = named_by(supervisor)
        if worker not in (0, other_than) and state_of(worker) not in ("Z", "X", ""):
            return worker
        if time.monotonic() > deadline:
            raise NoWorker(f"supervisor {supervisor} has no worker after {limit_s:.0f} s")
        time.sleep(_POLL_S)


def state_of(pid: int) -> str:
    """The letter of its state in /proc, empty if it has gone."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def end(
    supervisor: int, worker: int, limit_s: float, number: signal.Signals = signal.SIGKILL,
    meanwhile: Callable[[], None] = lambda: None,
) -> Death | None:  # fmt: skip
    """Send `worker` a signal, call `meanwhile`, and wait for its end; None if it had ended before.

    Raises NoWorker if it has not ended after `limit_s`.
    """
    try:
        pidfd = os.pidfd_open(worker)
    except ProcessLookupError:
        return None
    try:
        if worker not in children_of(supervisor):
            return None
        sent_ns = time.monotonic_ns()
        signal.pidfd_send_signal(pidfd, number)
        meanwhile()
        if not select.select([pidfd], [], [], limit_s)[0]:
            raise NoWorker(f"worker {worker} did not end within {limit_s:.0f} s after {number.name}")
        return Death(worker, sent_ns, time.monotonic_ns())
    finally:
        os.close(pidfd)
