"""A snapshot: what the metrics read, at one moment, from the services of a running daemon.

It is the only module of observe/ that knows where in the services a figure is. What takes the store's lock or asks the kernel is
read at most once, when the first metric needs it, so that a small file does not pay for what only control/stat shows. All else are
counters that are kept as things happen: reading one is reading one attribute.

Invariant: 1. A snapshot changes nothing and scans neither slots nor segments.

Made in trio's thread, used at once, and dropped.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from functools import cached_property

from tmemfs import __version__
from tmemfs.engine import Engine
from tmemfs.jobs.cleaner import Cleaner
from tmemfs.jobs.kernel_tuning import KernelTuning
from tmemfs.jobs.pressure import Pressure
from tmemfs.jobs.shrinker import ShrinkCounts
from tmemfs.pages.reader import ReadCounts
from tmemfs.services import Services
from tmemfs.store.merge_plans import MergeCounts
from tmemfs.store.native import IS_COMPILED
from tmemfs.store.recompression import RecompressionCounts
from tmemfs.store.statistics import TmemStatistics
from tmemfs.store.tmem import Counts
from tmemfs.system.kernel_settings import Change
from tmemfs.system.memory import Resident, resident_bytes
from tmemfs.system.status_region import Word

#: While frames are released without a pause, no two readings agree. One takes 50 us.
_MOST_READINGS = 8


class Snapshot:
    """The figures of `services` now."""

    version = __version__
    is_compiled = int(IS_COMPILED)

    def __init__(self, services: Services) -> None:
        self.services = services
        self.engine: Engine = services.engine
        self.pressure: Pressure = services.pressure

    @property
    def pid(self) -> int:
        """The daemon's process: the supervisor."""
        return self.services.daemon_pid

    @property
    def worker_pid(self) -> int:
        """The worker's process."""
        return os.getpid()

    def supervised(self, word: Word) -> int | None:
        """A word of the supervisor about its workers; None where there is no supervisor."""
        return self.services.status.words[word] if self.services.status else None

    @property
    def pressure_ceiling(self) -> int | float:
        """What the pool may hold by the pressure controller, in bytes."""
        return _whole(self.pressure.decision.ceiling)

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is degraded."""
        return self.services.state() == "running"

    # ---- the engine ------------------------------------------------------------------------------------------------

    @cached_property
    def store(self) -> TmemStatistics:
        """What the store holds: one reading under its lock."""
        return self.services.statistics()

    @property
    def counts(self) -> Counts:
        """What the store has done."""
        return self.engine.tmem.counts

    @property
    def writes(self) -> ShrinkCounts:
        """What write-back has done."""
        return self.engine.shrinker.counts

    @property
    def reads(self) -> ReadCounts:
        """What was read from the tier."""
        return self.engine.reader.counts

    @property
    def merges(self) -> MergeCounts:
        """What compaction and cleaning have done."""
        return self.engine.tmem.merges.counts

    @property
    def cleaner(self) -> Cleaner:
        """The cleaner."""
        return self.engine.cleaner

    @property
    def recompression(self) -> RecompressionCounts:
        """What recompression has done."""
        return self.engine.recompressor.counts

    @property
    def codec(self) -> str:
        """How pages are compressed now."""
        return self.engine.pager.codec.name

    @property
    def swap_bytes(self) -> int:
        """Size of the image."""
        return self.engine.pager.swap_bytes

    @property
    def same_filled_pages(self) -> int:
        """Pages of one repeated word, as zram counts them: pages of zeros are among them."""
        return self.store.zero_pages + self.store.fill_pages

    @property
    def write_amplification(self) -> float:
        """Bytes written to the tier per byte first stored; 0 before the first store."""
        # cleaning writes again what was written back before: both wear the disk
        written = self.writes.written_bytes + self.merges.cleaned_bytes
        return written / self.store.stored_bytes if self.store.stored_bytes else 0.0

    @property
    def cleaner_budget_left(self) -> int | float:
        """Bytes left of the day's budget of cleaning; infinite where there is no limit."""
        return _whole(self.cleaner.budget.left_today(time.monotonic()))

    # ---- memory ----------------------------------------------------------------------------------------------------

    @property
    def table_bytes(self) -> int:
        """Memory of the tables."""
        tmem = self.engine.tmem
        return tmem.slots.region.resident_bytes() + tmem.segments.region.resident_bytes()

    @property
    def resident(self) -> Resident:
        """Resident memory of the daemon."""
        return self._resident[0]

    @property
    def pool_resident(self) -> int:
        """Memory of the frames, which is part of `resident`, of the same moment if there is one."""
        return self._resident[1]

    @cached_property
    def _resident(self) -> tuple[Resident, int]:
        region = self.engine.tmem.arena.region
        pool = region.resident_bytes()
        # Frames are released meanwhile. Figures of two moments would differ by frames that are counted in one of them only, so
        # both are read again until the pool is the same before and after.
        for _ in range(_MOST_READINGS):
            resident, before, pool = self._resident_now(), pool, region.resident_bytes()
            if pool == before:
                break
        return resident, pool

    def _resident_now(self) -> Resident:
        """Of worker, supervisor and spare: what each has for itself, and once what they have mapped in common."""
        worker = resident_bytes(os.getpid())
        if self.pid == os.getpid():
            return worker
        others = [resident_bytes(self.pid)]
        if spare := self.supervised(Word.SPARE_PID):
            with suppress(OSError):  # it may have ended since
                others.append(resident_bytes(spare))
        anon = worker.anon + sum(other.anon for other in others)
        return Resident(anon, max(worker.file, others[0].file), max(worker.shmem, others[0].shmem))

    # ---- the machine -----------------------------------------------------------------------------------------------

    @property
    def tuning(self) -> KernelTuning:
        """What is changed of the machine's settings."""
        return self.pressure.tuning

    @cached_property
    def _changes(self) -> dict[str, Change]:
        # four metrics read it, and each reading reads the settings in /proc
        return {change.name: change for change in self.tuning.changes()}

    def setting(self, name: str) -> int | None:
        """A kernel setting now; None while it is not ours to change."""
        change = self._changes.get(name)
        return change.now if change else None

    def setting_of_administrator(self, name: str) -> int | None:
        """The administrator's value of a kernel setting; None while it is not ours to change."""
        change = self._changes.get(name)
        return change.administrators if change else None

    @property
    def is_latency_held(self) -> int | None:
        """Whether idle CPUs are kept awake; None where they cannot be."""
        is_held = self.services.latency.is_held
        return None if is_held is None else int(is_held)

    def outcome(self, name: str) -> int | None:
        """1: protection `name` is in force; 0: it could not be enabled; None: it was not tried."""
        return self.services.outcomes.get(name)

    def request_count(self, name: str) -> int | None:
        """A counter of the page path; None where no relay runs, as in tests of the services alone."""
        return self._requests.get(name)

    @cached_property
    def _requests(self) -> dict[str, int]:
        return self.services.request_counts()


def _whole(value: float) -> int | float:
    """`value` without its fraction; infinite where it is."""
    return value if math.isinf(value) else int(value)
