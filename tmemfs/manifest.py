"""The manifest: what a supervisor hands to another version's, which it has executed: open descriptors, and what to know of them.

It is JSON in a memfd. The two sides may be of any two versions. What the older one does not know, it ignores, and what it does not
say has its default. Only the regions' content cannot be guessed: a manifest of another LAYOUT is refused before anything else of it
is read.

    layout, version, supervisor   who hands over
    options, geometry             as the daemon was started (Options, Geometry)
    init, resends, capacity_bytes, can_discard   of the device, and of the tier
    fds                           numbers of inherited descriptors, by name: those of the holdings, and those of Handover
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from tmemfs import __version__
from tmemfs.backing import OpenTier, open_tier
from tmemfs.errors import Refused
from tmemfs.fuse.kept_requests import KeptRequests
from tmemfs.fuse.mount import Device
from tmemfs.holdings import LAYOUT, Geometry, Holdings, Regions
from tmemfs.options import Options
from tmemfs.store.region import Region
from tmemfs.system import memory
from tmemfs.system.kept_settings import KeptSettings
from tmemfs.system.memory_safety import MemorySafety
from tmemfs.system.status_region import FORMAT, StatusRegion, Word

T = TypeVar("T")

_PATHS: Final = ("mountpoint", "backing", "log")
_ADVICE: Final = "take it down and up again ('tmemfs down', 'tmemfs up') to change the version"


@dataclass(frozen=True, slots=True)
class Manifest:
    """Of process `supervisor`, which is of `version`. `can_discard` and `capacity_bytes` are the tier's; see above."""

    layout: int
    version: str
    supervisor: int
    options: Options
    geometry: Geometry
    init: bytes
    resends: bool
    tier: OpenTier
    fds: Mapping[str, int]

    @classmethod
    def of(cls, options: Options, holdings: Holdings, fds: Mapping[str, int]) -> Manifest:
        """That of this process; `fds` are those that are not of the holdings."""
        device, tier, regions = holdings.device, holdings.tier, holdings.regions
        held = {
            "device": device.fd,
            "slots": regions.slots.fd,
            "segments": regions.segments.fd,
            "arena": regions.arena.fd,
            "requests": holdings.requests.fd,
            "status": holdings.status.fd,
            "kept_settings": holdings.kept_settings.fd,
        }
        if holdings.settings_user is not None:
            held["settings"] = holdings.settings_user
        return cls(
            LAYOUT,
            __version__,
            os.getpid(),
            options,
            holdings.geometry,
            device.init,
            device.resends,
            OpenTier(dict(holdings.tier_fds), tier.capacity_bytes, tier.can_discard),
            {**held, **holdings.tier_fds, **fds},
        )

    def encode(self) -> bytes:
        """As JSON."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        options = {name: os.fspath(value) if isinstance(value, Path) else value for name, value in asdict(self.options).items()}
        return json.dumps(
            found | {"options": options, "geometry": asdict(self.geometry), "tier": asdict(self.tier), "init": self.init.hex()}
        ).encode()

    @classmethod
    def decode(cls, text: bytes) -> Manifest:
        """What `encode` of any version has returned. Raises Refused for another layout."""
        found = json.loads(text)
        if found["layout"] != LAYOUT:
            raise Refused(
                f"version {__version__} has layout {LAYOUT} of the regions, and the daemon has {found['layout']}: {_ADVICE}"
            )
        options = {name: Path(value) if name in _PATHS and value else value for name, value in found["options"].items()}
        converted = {
            "options": _known(Options, options),
            "tier": _known(OpenTier, found["tier"]),
            "geometry": _known(Geometry, found["geometry"]),
            "init": bytes.fromhex(found["init"]),
        }
        return _known(cls, found | converted)

    def adopt(self, safety: MemorySafety) -> Holdings:
        """The holdings, mapped and locked in this process too. Raises Refused, OSError."""
        device = Device(self.fds["device"], self.init, self.resends)
        status = StatusRegion(self.fds["status"])
        if status.words[Word.FORMAT] != FORMAT:
            raise Refused(f"version {__version__} has another layout of the status region: {_ADVICE}")
        sizes, requests_bytes = self.geometry.region_bytes(), KeptRequests.region_bytes(keeps=not self.resends)
        regions = Regions.over(*(self._region(name, size_bytes) for name, size_bytes in sizes.items()))
        regions.lock(safety)
        requests, kept = self._region("requests", requests_bytes), KeptSettings(self.fds["kept_settings"])
        for locked in (status, requests, kept):
            safety.note_lock(memory.lock_region(locked.map, locked.size_bytes))
        safety.note_lock(memory.lock_future())
        tier, tier_fds = open_tier(self.options, safety, self.tier)
        settings_user = self.fds.get("settings")
        return Holdings(device, tier, tier_fds, self.geometry, regions, requests, status, settings_user, kept)

    def _region(self, name: str, size_bytes: int) -> Region:
        """The region behind an inherited descriptor, if it has the size that this version expects. Raises Refused."""
        fd = self.fds[name]
        if not 0 <= os.fstat(fd).st_size - size_bytes < mmap.PAGESIZE:
            raise Refused(f"version {__version__} has another size of the region {name}: {_ADVICE}")
        return Region(name, size_bytes, fd)


def _known(kind: type[T], found: Mapping[str, Any]) -> T:
    """A dataclass of those values that it has fields for."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in found.items() if name in names})
