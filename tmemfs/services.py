"""The parts of a running daemon, for those who report on it and steer it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tmemfs.engine import Engine
from tmemfs.jobs.limits import Limits
from tmemfs.jobs.pressure import Pressure
from tmemfs.jobs.supervision import Jobs
from tmemfs.store.damage import Unacknowledged
from tmemfs.store.statistics import TmemStatistics, statistics
from tmemfs.system.status_region import StatusRegion


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

    def statistics(self) -> TmemStatistics:
        """The store's."""
        return statistics(self.engine.tmem)

    def state(self) -> str:
        """running, degraded: WHY, or draining."""
        if self.is_draining():
            return "draining"
        reasons = ([self.engine.free_frames.stuck] if self.engine.free_frames.stuck else []) + self.jobs.degraded()
        reasons += _reasons(self.engine.tmem.damage.since_acknowledged)
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
