"""Disks that are slower than the machine's own, made by limiting it for all contenders alike.

    fast    the machine's disk as it is
    sata    a SATA SSD
    cloud   a cloud volume
    sd      an SD card

The limits are those of the block I/O controller: blkio.throttle.* of the root group in cgroup v1, where they apply to everything
that no other group holds; in cgroup v2, where the root group has no limits, io.max of each group below it, also of those that are
made while the benchmark runs (`DiskLimits.renew`). A limit of reads and one of writes are separate, as the controller has them. The
disk is the whole one that holds the benchmark's directory.

The kernel's own swap requests are not limited as those of programs are: the controller dispatches swap-outs at once, whatever the
limit, and counts swap-ins before they are merged, where a disk counts them afterwards. So where the disk is limited, swap files are
behind a loop device with direct I/O (contenders.py), from which both come as requests of an ordinary program
(docs/decisions/0023-swap-files-behind-loop-on-a-limited-disk.md).

Knows nothing of what the disk does then: disk_watch.py counts that.

Sources: Documentation/admin-guide/cgroup-v1/blkio-controller.rst, Documentation/admin-guide/cgroup-v2.rst (io.max).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from tmemfs.errors import Refused
from tools.bench.accounts import disk_of
from tools.bench.settings import Change

_CGROUPS: Final = Path("/sys/fs/cgroup")
_DEVICES: Final = Path("/sys/dev/block")
#: The major number of file systems without a block device.
_NO_DISK: Final = "0:"
#: The limits as io.max of cgroup v2 names them.
_MAXIMA: Final = {"read_iops": "riops", "write_iops": "wiops", "read_bps": "rbps", "write_bps": "wbps"}


@dataclass(frozen=True, slots=True)
class Rates:
    """Requests and bytes per second, each way; None is no limit."""

    read_iops: float | None = None
    write_iops: float | None = None
    read_bps: float | None = None
    write_bps: float | None = None


@dataclass(frozen=True, slots=True)
class Profile:
    """A disk by name."""

    name: str
    limits: Rates

    @property
    def is_limited(self) -> bool:
        """Whether it is another disk than the machine's."""
        return self.limits != Rates()

    @property
    def text(self) -> str:
        """Name and limits in words."""
        one = self.limits
        said = [
            *([f"{one.read_iops:,.0f} reads per s"] if one.read_iops else []),
            *([f"{one.write_iops:,.0f} writes per s"] if one.write_iops else []),
            *([f"{one.read_bps / 1e6:.0f} MB/s read"] if one.read_bps else []),
            *([f"{one.write_bps / 1e6:.0f} MB/s written"] if one.write_bps else []),
        ]
        return f"{self.name} ({', '.join(said) or 'no limit'})"


PROFILES: Final = {
    one.name: one
    for one in (
        Profile("fast", Rates()),
        Profile("sata", Rates(40_000, 40_000, 500e6, 500e6)),
        Profile("cloud", Rates(3_000, 3_000, 125e6, 125e6)),
        Profile("sd", Rates(1_500, None, 40e6, 20e6)),
    )
}


def whole_disk(place: Path, devices: Path = _DEVICES) -> str:
    """'MAJOR:MINOR' of the whole disk that holds `place`, or of its file system if no block device does."""
    number = disk_of(place)
    if not (devices / number).exists():
        return number
    device = (devices / number).resolve()
    # the controller knows whole disks only; the directory of a partition is in that of its disk
    return ((device.parent if (device / "partition").exists() else device) / "dev").read_text().strip()


@dataclass(frozen=True, slots=True)
class DiskLimits:
    """A profile for one disk, as the block I/O controller below `cgroups` is told it."""

    profile: Profile
    disk: str
    cgroups: Path = _CGROUPS

    def changes(self) -> list[Change]:
        """What sets the limits, and what restores those of before. Raises Refused without a disk or a controller."""
        wanted = self._wanted()
        if not wanted:
            return []
        if self.disk.startswith(_NO_DISK):
            raise Refused("the directory is on no block device whose rate could be limited: choose another --directory")
        files = {name: self.cgroups / "blkio" / f"blkio.throttle.{name}_device" for name in wanted}
        if all(file.exists() for file in files.values()):
            return [self._change(file, str(wanted[name]), "0") for name, file in files.items()]
        if groups := self._groups():
            return [self._change(file, self._maxima(), " ".join(f"{name}=max" for name in _MAXIMA.values())) for file in groups]
        raise Refused("no block I/O controller: write +io to /sys/fs/cgroup/cgroup.subtree_control, or choose --disk fast")

    def renew(self) -> None:
        """In cgroup v2, limit the groups that were made meanwhile."""
        for file in self._groups() if self._wanted() else ():
            # a group may be removed at any time
            with suppress(OSError):
                if not _line_of(self.disk, file.read_text()):
                    file.write_text(f"{self.disk} {self._maxima()}")

    def _change(self, file: Path, during: str, without: str) -> Change:
        return Change(file, f"{self.disk} {during}", _line_of(self.disk, file.read_text()) or f"{self.disk} {without}")

    def _groups(self) -> list[Path]:
        return sorted(self.cgroups.glob("*/io.max"))

    def _wanted(self) -> dict[str, int]:
        return {name: int(rate) for name, rate in asdict(self.profile.limits).items() if rate}

    def _maxima(self) -> str:
        return " ".join(f"{_MAXIMA[name]}={rate}" for name, rate in self._wanted().items())


def _line_of(disk: str, text: str) -> str:
    """The line of `disk` in a file of the controller; empty if it has none."""
    return next((line for line in text.splitlines() if line.split()[:1] == [disk]), "")
