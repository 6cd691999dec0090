"""The parts of a running daemon, for those who report on it and steer it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tmemfs.engine import Engine
from tmemfs.jobs.limits import Limits
from tmemfs.jobs.pressure import Pressure
from tmemfs.jobs.supervision import Jobs
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
        if self.engine.tmem.counts.damaged_in_ram:
            reasons.append(f"{self.engine.tmem.counts.damaged_in_ram} loads found a record damaged in RAM: test the memory")
        if self.engine.reader.counts.corrupt:
            reasons.append(f"{self.engine.reader.counts.corrupt} loads found a damaged record: check the backing device")
        if self.engine.reader.counts.failed:
            reasons.append(f"{self.engine.reader.counts.failed} reads from the backing failed: check the backing device")
        return "degraded: " + "; ".join(reasons) if reasons else "running"
