"""Jobs: what runs in the background, supervised, so that no failure of a job ends the mount.

A job is an async function that runs until it is cancelled. One that raises is counted, logged with its trace, and started again
after a pause, which doubles up to LONGEST_PAUSE_S while it keeps failing. `degraded` names a job for HEALTHY_S after its last
failure. A job that returns has done its work and is not started again.

Knows nothing of what the jobs do; the page path knows nothing of jobs.

Invariant: 1. `run` ends only by cancellation, or once every job has returned: no exception of a job leaves it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio

log = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 0.1
#: Stores may wait for a job, so a job that may work again is not left alone for longer.
LONGEST_PAUSE_S: Final = 5.0
#: So long without a failure, a job counts as healthy again.
HEALTHY_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Job:
    """What `run` does, by name. `failed` is told each failure, in trio's thread, before the pause."""

    name: str
    run: Callable[[], Awaitable[object]]
    failed: Callable[[str], None] = lambda why: None


@dataclass(slots=True)
class _Health:
    """Failures of one job since the start, the last one's reason and its time."""

    failures: int = 0
    why: str = ""
    failed_at: float = 0.0
    pause_s: float = FIRST_PAUSE_S


class Jobs:
    """Supervises jobs. `run` and `add` in trio; the rest from any thread."""

    def __init__(self) -> None:
        self._health: dict[str, _Health] = {}

    @property
    def failures(self) -> int:
        """Failures of all jobs since the start."""
        return sum(health.failures for health in self._health.values())

    def degraded(self) -> list[str]:
        """'job NAME failed N times: why' for each job that has failed within HEALTHY_S."""
        now = time.monotonic()
        return [
            f"job {name} failed {health.failures} times: {health.why}"
            for name, health in self._health.items()
            if health.failures and now - health.failed_at < HEALTHY_S
        ]

    async def run(self, jobs: tuple[Job, ...]) -> None:
        """Run `jobs` until cancelled, or until all of them have returned."""
        async with trio.open_nursery() as nursery:
            for job in jobs:
                nursery.start_soon(self._supervise, job, name=f"job {job.name}")

    async def _supervise(self, job: Job) -> None:
        health = self._health.setdefault(job.name, _Health())
        while True:
            try:
                await job.run()
                return
            except Exception as error:  # not BaseException: a cancellation ends the job for good (invariant 1)
                self._note(job, health, error)
            await trio.sleep(health.pause_s)

    def _note(self, job: Job, health: _Health, error: Exception) -> None:
        """Count and log a failure; must not raise, whatever the job has done."""
        now = time.monotonic()
        # A failure after a long time of health is a first one again: its cause may be gone with the next try.
        was_healthy = now - health.failed_at >= HEALTHY_S
        health.failures += 1
        health.why = _why(error)
        health.pause_s = FIRST_PAUSE_S if was_healthy or health.failures == 1 else min(2 * health.pause_s, LONGEST_PAUSE_S)
        health.failed_at = now
        try:
            # a job that fails for days must not fill the disk: the 1st, 2nd, 4th, 8th ... failure is logged
            if not health.failures & (health.failures - 1):
                log.error("job %s failed %d times, next try in %.1f s", job.name, health.failures, health.pause_s, exc_info=error)
            job.failed(f"job {job.name} failed: {health.why}")
        except Exception:  # of the log or of the job's own function: supervising goes on
            health.why += " (and could not be logged)"


def first_error(error: BaseException) -> BaseException:
    """`error`, or the first one where a nursery has collected several."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _why(error: BaseException) -> str:
    """One line."""
    error = first_error(error)
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
