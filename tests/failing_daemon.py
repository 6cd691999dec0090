"""A daemon that everything but the page path fails in: `python -m tests.failing_daemon DIRECTORY SIZE POOL_MAX LOG`.

Mounts at DIRECTORY/mnt with DIRECTORY/backing. From the moment the mount answers, every job raises some hundred milliseconds after
each start, trio's threads cannot be used, no thread can be created, and the event loop fails twice.
"""

from __future__ import annotations

import logging
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import trio

from tmemfs import supervisor, worker
from tmemfs.holdings import Holdings
from tmemfs.jobs.supervision import Job, Jobs
from tmemfs.options import Options
from tmemfs.system.memory_safety import MemorySafety
from tmemfs.units import parse_size
from tmemfs.worker import Birth

_LOOP_FAILURES = 2
_chance = random.Random(11)


class Injected(Exception):
    """Not one of tmemfs's own errors: as a bug would raise."""


def no_thread(*_: Any, **__: Any) -> NoReturn:
    """What threading.Thread.start does where no more threads are allowed."""
    raise RuntimeError("can't start new thread")


def failing(job: Job) -> Job:
    """`job`, which raises after a while."""

    async def run() -> None:
        with trio.move_on_after(_chance.uniform(0.1, 0.6)):
            await job.run()
        raise Injected(f"injected into {job.name}")

    return Job(job.name, run, job.failed)


class FailingJobs(Jobs):
    """Supervises failing jobs, beside an event loop that fails."""

    loops = 0

    async def run(self, jobs: tuple[Job, ...]) -> None:
        """As Jobs does; the first runs end the event loop after a second."""
        FailingJobs.loops += 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(super().run, tuple(map(failing, jobs)))
            if FailingJobs.loops <= _LOOP_FAILURES:
                await trio.sleep(1)
                raise Injected("injected into the event loop")


def main() -> None:
    """Serve, failing."""
    directory, size, pool_max, log = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, filename=log)
    setattr(worker, "Jobs", FailingJobs)  # noqa: B010
    options = Options(Path(directory) / "mnt", parse_size(size), pool_max, Path(directory) / "backing")

    supervisor.serve(options, lambda: print("ready", flush=True), run_failing)


def run_failing(options: Options, holdings: Holdings, safety: MemorySafety, birth: Birth, announce: Callable[[], None]) -> None:
    """Be a worker in which everything fails once it has announced itself."""

    def announce_and_fail() -> None:
        setattr(trio.to_thread, "run_sync", no_thread)  # noqa: B010
        setattr(threading.Thread, "start", no_thread)  # noqa: B010
        announce()

    worker.run_worker(options, holdings, safety, birth, announce_and_fail)


if __name__ == "__main__":
    main()
