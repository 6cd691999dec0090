"""The holdings: what must outlive a worker. The supervisor makes them, and each worker that it forks finds them where they were.

    device     /dev/fuse, with the mount that hangs on it, and the kernel's first request on it, INIT
    tier       with the locked descriptor of its backing
    regions    slots, segments, arena, requests: memfds, mapped and locked here too, so that they stay in RAM while no worker lives
    status     what commands read of supervisor and worker
    settings   who uses the machine's settings: that one lives as long as the supervisor does (system/kernel_settings.py)
    kept       what users have changed since the start, for the next worker

The supervisor's mappings count for the kernel: it takes a page for locked as long as one process has locked it. Slots, segments
and requests are locked whole. The arena is larger than the pool may ever be, so it is locked as it is touched, and the worker has
what it touches kept (system/kept_mapping.py).

Constant after construction.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tmemfs.fuse.mount import Device
from tmemfs.jobs.limits import parse_pool_max
from tmemfs.options import Options, frames_and_extents
from tmemfs.store.frames import KEPT_FRAMES
from tmemfs.store.region import Region
from tmemfs.store.segments import table_bytes
from tmemfs.store.slots import SLOT_BYTES
from tmemfs.system import memory
from tmemfs.system.kept_mapping import KeptMapping
from tmemfs.system.kept_settings import KeptSettings
from tmemfs.system.memory_safety import MemorySafety
from tmemfs.system.status_region import StatusRegion
from tmemfs.tiers.tier import Tier
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES, parse_size

#: Changes whenever the content of a region does: a worker adopts no regions of another layout.
LAYOUT: Final = 2


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of the regions: slots, frames and extents; and the limits that a first worker starts with, in bytes."""

    slots: int
    frames: int
    extents: int
    ram_bytes: int
    pool_bytes: int
    backing_bytes: int

    @classmethod
    def of(cls, options: Options, tier: Tier) -> Geometry:
        """What `options` ask for, on this machine."""
        ram = memory.total_ram_bytes()
        frames, extents = frames_and_extents(options.swap_bytes, ram)
        if tier.most_extents is not None:
            extents = min(extents, tier.most_extents)
        backing_bytes = parse_size(options.backing_max, tier.capacity_bytes)
        return cls(options.swap_bytes // PAGE_BYTES, frames, extents, ram, parse_pool_max(options.pool_max, ram), backing_bytes)

    def region_bytes(self) -> dict[str, int]:
        """Size of each region of the store, by name."""
        return {
            "slots": self.slots * SLOT_BYTES,
            "segments": table_bytes(self.frames + self.extents),
            "arena": self.frames * SEGMENT_BYTES,
        }


@dataclass(frozen=True, slots=True)
class Regions:
    """The memfds of the store, and the frames that are kept mapped."""

    slots: Region
    segments: Region
    arena: Region
    kept: KeptMapping

    @classmethod
    def create(cls, geometry: Geometry) -> Regions:
        """New ones."""
        return cls.over(*(Region(name, size_bytes) for name, size_bytes in geometry.region_bytes().items()))

    @classmethod
    def over(cls, slots: Region, segments: Region, arena: Region) -> Regions:
        """These, with the arena kept mapped in this process."""
        return cls(slots, segments, arena, KeptMapping(arena.map))

    def keep_used(self) -> None:
        """Map here what of the arena is in memory, as if this process had seen it being faulted in. Raises OSError.

        A frame that is released at the same moment may get some of its pages back, until it is used again.
        """
        at = 0
        try:
            while True:
                at = os.lseek(self.arena.fd, at, os.SEEK_DATA)
                end = os.lseek(self.arena.fd, at, os.SEEK_HOLE)
                self.kept.keep(at, end - at)
                at = end
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing is behind the offset
                raise

    def lock(self, safety: MemorySafety) -> None:
        """Lock them in this process."""
        for region in (self.slots, self.segments):
            safety.note_lock(memory.lock_region(region.map, region.size_bytes))
        safety.note_lock(memory.lock_on_fault(self.arena.map, self.arena.size_bytes))
        # The buffers of cleaning are needed just when memory is short, so they are faulted in now.
        memory.populate(self.arena.map, 0, KEPT_FRAMES * SEGMENT_BYTES)


@dataclass(frozen=True, slots=True)
class Holdings:
    """All of it. `tier_fds` are the descriptors that the tier consists of, by name (backing.py)."""

    device: Device
    tier: Tier
    tier_fds: Mapping[str, int]
    geometry: Geometry
    regions: Regions
    requests: Region
    status: StatusRegion
    settings_user: int | None
    kept_settings: KeptSettings
