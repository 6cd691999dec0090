"""The parts of a running daemon, for those who report on it and steer it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from tmemfs.engine import Engine
from tmemfs.errors import Refused
from tmemfs.jobs.latency import Latency
from tmemfs.jobs.limits import Limits
from tmemfs.jobs.pressure import Pressure
from tmemfs.jobs.supervision import HEALTHY_S, Jobs
from tmemfs.store.damage import Unacknowledged
from tmemfs.store.statistics import TmemStatistics, statistics
from tmemfs.system.status_region import Cause, Death, StatusRegion, Word

#: So many workers killed within a minute are no deliberate act.
_MANY_KILLS: Final = 3


@dataclass(frozen=True, slots=True)
class Services:
    """The parts. `outcomes` says which measures of memory safety are in effect.

    `request_counts` gives the counters of the relay, `is_draining` whether the daemon is being stopped. `status` is what the
    supervisor, process `daemon_pid`, says of its workers; None where this process has no supervisor.
    """

    engine: Engine
    limits: Limits
    pressure: Pressure
    jobs: Jobs
    outcomes: Mapping[str, int] = field(default_factory=dict)
    request_counts: Callable[[], dict[str, int]] = dict
    is_draining: Callable[[], bool] = bool
    status: StatusRegion | None = None
    daemon_pid: int = field(default_factory=os.getpid)
    latency: Latency = field(default_factory=lambda: Latency("off"))

    def statistics(self) -> TmemStatistics:
        """The store's."""
        return statistics(self.engine.tmem)

    @property
    def watchdog_s(self) -> float:
        """How long requests may wait for a worker that answers none; 0: for ever, as where there is no supervisor."""
        return self.status.words[Word.WATCHDOG_MS] / 1000 if self.status else 0.0

    def set_watchdog(self, seconds: float) -> None:
        """Change that. Raises Refused where there is no supervisor."""
        if self.status is None:
            raise Refused("this daemon has no supervisor: start it by 'tmemfs mount' or 'up'")
        self.status.words[Word.WATCHDOG_MS] = int(seconds * 1000)

    def state(self) -> str:
        """running, degraded: WHY, or draining."""
        if self.is_draining():
            return "draining"
        reasons = ([self.engine.free_frames.stuck] if self.engine.free_frames.stuck else []) + self.jobs.degraded()
        reasons += _reasons(self.engine.tmem.damage.since_acknowledged)
        reasons += restarts_degrade(self.status.deaths(), time.monotonic_ns()) if self.status else []
        return "degraded: " + "; ".join(reasons) if reasons else "running"


def _reasons(damage: Unacknowledged) -> list[str]:
    """What is said of damage that nobody has acknowledged."""
    said = (
        (damage.in_ram, "records damaged in RAM: test the memory"),
        (damage.on_tier, "damaged records: check the backing device"),
    )
    reasons = [f"loads found {count} {what}" for count, what in said if count]
    if damage.failed_reads:
        reasons.append(f"{damage.failed_reads} reads from the backing failed: check the backing device")
    return reasons


def restarts_degrade(deaths: list[Death], now_ns: int) -> list[str]:
    """Why `deaths` of workers make a daemon count as degraded; nothing if they do not.

    One that crashed or hung does, for as long as a job that failed. One that was killed does not: the kill was meant; several
    do, as the OOM killer may have done it.
    """
    last = [death for death in deaths if now_ns - death.at_ns < HEALTHY_S * 1e9]
    if len(last) < _MANY_KILLS and all(death.cause is Cause.KILLED for death in last):
        return []
    times = "once" if len(last) == 1 else f"{len(last)} times"
    return [f"the worker was replaced {times} in the last minute: {last[-1].said}"]
