"""Parts to build tests from: a small store, pages of every kind, a tier that fails when told to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar, Final, Literal

import trio

from tmemfs.engine import Engine
from tmemfs.errors import TierError
from tmemfs.jobs.kernel_tuning import KernelTuning
from tmemfs.jobs.limits import Limits
from tmemfs.jobs.pressure import Pressure
from tmemfs.store.extents import Extents
from tmemfs.store.frames import Arena
from tmemfs.store.merge_plans import Copied, Merge
from tmemfs.store.region import Region
from tmemfs.store.segments import SegmentTable, table_bytes
from tmemfs.store.slots import SLOT_BYTES, SlotTable
from tmemfs.store.tmem import Tmem
from tmemfs.store.transitions import Notice
from tmemfs.system.kernel_settings import Change
from tmemfs.system.pressure_signals import Memory, PressureSignals
from tmemfs.tiers.in_memory import MemoryTier
from tmemfs.tiers.tier import Extent, Tier
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES

Kind = Literal["zero", "fill", "raw", "half", "text"]
KINDS: Final[tuple[Kind, ...]] = ("zero", "fill", "raw", "half", "text")
Operation = Literal["write", "read", "discard"]


def page_of(kind: Kind, seed: int) -> bytes:
    """A page that is all zero, one repeated word, incompressible, half of that, or well compressible."""
    if kind == "zero":
        return bytes(PAGE_BYTES)
    if kind == "fill":
        return (seed + 1).to_bytes(8, "little") * (PAGE_BYTES // 8)
    if kind == "raw":
        return Random(seed).randbytes(PAGE_BYTES)
    if kind == "half":
        return Random(seed).randbytes(PAGE_BYTES // 2).ljust(PAGE_BYTES, b"\0")
    return (b"page %d of a test. " % seed * PAGE_BYTES)[:PAGE_BYTES]


@dataclass(frozen=True, slots=True)
class Regions:
    """The state that outlives a worker, and what a store needs to start from it."""

    slots: Region
    segments: Region
    arena: Region
    frames: int
    extents: int

    @classmethod
    def new(cls, slots: int, frames: int, extents: int) -> Regions:
        """Empty regions."""
        return cls(
            Region("slots", slots * SLOT_BYTES),
            Region("segments", table_bytes(frames + extents)),
            Region("arena", frames * SEGMENT_BYTES),
            frames,
            extents,
        )

    def close(self) -> None:
        """Give the descriptors back."""
        for region in (self.slots, self.segments, self.arena):
            region.close()

    def start(
        self, limit: int, slots: int, spare: int = 0, reserve_bytes: int = 0, notice: Notice = lambda frame_freed: None
    ) -> Tmem:
        """A store over these regions, with at most `limit` frames held, `spare` of them and `reserve_bytes` for merges."""
        return Tmem(
            SlotTable(slots, self.slots),
            SegmentTable(self.frames + self.extents, self.segments),
            Arena(self.frames, limit, self.arena, spare=spare),
            Extents(self.extents, reserve_bytes=reserve_bytes),
            notice,
        )


def new_tmem(
    slots: int = 4096, frames: int = 32, limit: int = 16, extents: int = 32, notice: Notice = lambda frame_freed: None
) -> Tmem:
    """An empty store."""
    return Regions.new(slots, frames, extents).start(limit, slots, notice=notice)


async def run_jobs(engine: Engine) -> None:
    """Everything of `engine` that goes on in the background, not supervised: a job that fails fails the test."""
    async with trio.open_nursery() as nursery:
        for job in engine.jobs:
            nursery.start_soon(job.run)


class FixedSignals(PressureSignals):
    """Signals of a machine with `headroom_bytes` to spare, which nothing else knows of."""

    def __init__(self, headroom_bytes: int = 1 << 40, memory_bytes: int = 1 << 40) -> None:
        self.headroom_bytes = headroom_bytes
        self.total_bytes = memory_bytes
        self.missing: list[str] = []
        self.limits = []
        self.stalls = []
        self.stalled_total_us = 0
        self.available_at_once: int | None = None
        self.under_write_back = 0

    @property
    def memory_bytes(self) -> int:
        """As given."""
        return self.total_bytes

    @property
    def live(self) -> list[str]:
        """What it pretends to be."""
        return ["fixed"]

    def memory(self) -> Memory:
        """As given; what is available at once is all of it if nothing is told."""
        available = self.headroom_bytes if self.available_at_once is None else self.available_at_once
        return Memory(self.headroom_bytes, available, self.under_write_back)

    def stalled_us(self) -> int:
        """As told."""
        return self.stalled_total_us


class NotedTuning(KernelTuning):
    """No setting of this machine: what would have been changed, and 1 in `shares` for each time it would have been restored."""

    def __init__(self) -> None:
        self.mode = "auto"
        self.engaged = self.requests = self.may_lower = True
        self.shares: list[float] = []
        self.have_priority = False

    @property
    def is_engaged(self) -> bool:
        """As told."""
        return self.engaged

    @property
    def has_requests(self) -> bool:
        """As told."""
        return self.requests

    @property
    def raised_workers(self) -> int:
        """As if there were one."""
        return int(self.have_priority)

    def changes(self) -> tuple[Change, ...]:
        """None."""
        return ()

    async def set_mode(self, mode: str) -> None:
        """It would be."""
        self.mode = mode

    def lower_minimum(self, share: float) -> bool:
        """It would be, if it may; again where it would be already."""
        if self.may_lower and self.shares[-1:] != [share]:
            self.shares.append(share)
        return self.may_lower

    def restore_minimum(self) -> None:
        """It would be, if it was lowered."""
        if self.shares and self.shares[-1] != 1:
            self.shares.append(1)

    def give_priority(self) -> None:
        """They would have it."""
        self.have_priority = True

    def take_priority(self) -> None:
        """They would not."""
        self.have_priority = False


def new_pressure(engine: Engine, signals: PressureSignals | None = None, tuning: KernelTuning | None = None) -> Pressure:
    """Pressure over `engine`, on a machine with memory to spare."""
    found = signals or FixedSignals()
    return Pressure(
        engine.tmem,
        engine.pool_size,
        engine.shrinker.counts,
        engine.notices.pressure,
        tuning or NotedTuning(),
        lambda: found,
    )


def new_limits(engine: Engine, ram_bytes: int, backing_bytes: int) -> Limits:
    """The limits of `engine`, on a machine of `ram_bytes`."""
    return Limits(engine.tmem, engine.tier, engine.pool_size, engine.shrinker, ram_bytes, backing_bytes)


def copy_for(tmem: Tmem, plan: Merge, tier: Tier) -> Copied:
    """Copy what lives for `plan`, and write it, where it is one to clean."""
    copied = Copied(plan.into if plan.into is not None else memoryview(bytearray(SEGMENT_BYTES)))
    for source in plan.sources:
        data = source.data
        if data is None:
            data = memoryview(bytearray(source.size_bytes))
            tier.read(source.extent, 0, data, source.sequence)
        tmem.merges.copy(plan, source, data, copied)
    if plan.extent is not None:
        tier.write(plan.extent, copied.data, plan.sequence, for_cleaning=True)
    return copied


def merge(tmem: Tmem, plan: Merge, tier: Tier) -> None:
    """Perform `plan`."""
    tmem.merges.commit(plan, copy_for(tmem, plan, tier))


@dataclass(slots=True)
class FaultyTier:
    """A memory tier that calls `before[operation]` first, which may raise, wait, or change what is stored."""

    inner: MemoryTier = field(default_factory=lambda: MemoryTier(1 << 30))
    before: dict[Operation, Callable[[], None]] = field(default_factory=dict)
    tears: bool = False
    can_discard: bool = True
    sector_bytes: int = MemoryTier.sector_bytes
    #: Claimed, not done: two threads write to a tier that encrypts.
    is_encrypted: bool = False

    name = "faulty"
    capacity_bytes = 1 << 30
    most_extents: ClassVar[int | None] = None

    def write(self, extent: Extent, data: memoryview, sequence: int, for_cleaning: bool = False) -> None:
        """Write; when it `tears`, only the first half arrives before the fault."""
        if self.tears:
            self.inner.write(extent, data[: len(data) // 2], sequence)
        self._meet("write")
        self.inner.write(extent, data, sequence)

    def read(self, extent: Extent, offset: int, into: memoryview, sequence: int) -> None:
        """Read."""
        self._meet("read")
        self.inner.read(extent, offset, into, sequence)

    def discard(self, extents: tuple[Extent, ...]) -> None:
        """Discard, if it can; a fault may be that it turns out that it cannot."""
        self._meet("discard")
        if self.can_discard:
            self.inner.discard(extents)

    def close(self) -> None:
        """Close."""
        self.inner.close()

    def fail(self, *operations: Operation) -> None:
        """From now on `operations` fail; none: everything works again."""
        self.before.clear()
        for operation in operations:
            self.before[operation] = _raise_tier_error

    def _meet(self, operation: Operation) -> None:
        self.before.get(operation, lambda: None)()


def _raise_tier_error() -> None:
    raise TierError("injected: the tier failed")
