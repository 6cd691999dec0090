"""The doctor: what this machine has of what tmemfs needs, and what to do about the rest. Changes nothing."""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tmemfs.errors import Refused
from tmemfs.host import proctext
from tmemfs.host.kernel_settings import Findings, KernelSettings
from tmemfs.host.memory import total_ram_bytes
from tmemfs.host.signals import Signals
from tmemfs.host.swapdev import swap_entries
from tmemfs.units import format_size

_CAP_IPC_LOCK, _CAP_SYS_ADMIN, _CAP_SYS_NICE, _CAP_SYS_RESOURCE = 14, 21, 23, 24
_PROGRAMS: Final = ("losetup", "mkswap", "swapon", "swapoff")


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `ok` None: it works without, but less well."""

    name: str
    ok: bool | None
    found: str
    advice: str = ""


def examine(backing: Path, not_compiled: str = "") -> list[Check]:
    """Every check, the essential ones first; `not_compiled` says why the store's compiled functions are not used."""
    return [
        _root(),
        _kernel(),
        _fuse(),
        _loop(),
        _programs(),
        _disk(backing),
        _capability("lock memory", _CAP_IPC_LOCK, "the pool may be swapped out itself: run with CAP_IPC_LOCK"),
        _capability("io_flusher, oom score", _CAP_SYS_RESOURCE, "run with CAP_SYS_RESOURCE, or protect the daemon from outside"),
        _capability("real-time", _CAP_SYS_NICE, "the daemon gets no memory that others do not: run with CAP_SYS_NICE"),
        _compiled(not_compiled),
        _pressure(),
        _cgroup(),
        _zswap(),
        _other_swaps(),
        _kernel_settings(),
        Check("RAM", True, format_size(total_ram_bytes())),
    ]


def require_root() -> None:
    """Raise Refused for whoever may not mount."""
    if not _is_root():
        raise Refused("mounting and swapping need root: run it with sudo")


def _is_root() -> bool:
    return os.geteuid() == 0 and _has_capability(_CAP_SYS_ADMIN)


def _root() -> Check:
    ok = _is_root()
    return Check("root", ok, "yes" if ok else "no", "" if ok else "mounting and swapon need root: run with sudo")


def _kernel() -> Check:
    release = os.uname().release
    major, minor = (int("".join(c for c in part if c.isdigit()) or 0) for part in release.split(".")[:2])
    ok = (major, minor) >= (5, 14)
    return Check("kernel", ok, release, "" if ok else "the reserve is faulted in by MADV_POPULATE_WRITE: use Linux 5.14 or later")


def _fuse() -> Check:
    ok = Path("/dev/fuse").exists() and b"\tfuse\n" in Path("/proc/filesystems").read_bytes()
    return Check("FUSE", ok, "yes" if ok else "no", "" if ok else "load the module: modprobe fuse")


def _loop() -> Check:
    ok = Path("/dev/loop-control").exists()
    found = "yes, discard reaches the store with the relay" if ok else "no"
    return Check("loop", ok, found, "" if ok else "load the module: modprobe loop")


def _programs() -> Check:
    missing = [name for name in _PROGRAMS if not shutil.which(name)]
    advice = "apt-get install util-linux mount" if missing else ""
    return Check("programs", not missing, "missing: " + " ".join(missing) if missing else " ".join(_PROGRAMS), advice)


def _disk(backing: Path) -> Check:
    place = next(parent for parent in (backing, *backing.parents) if parent.exists())
    if place.is_block_device():
        with open(place, "rb") as device:
            free = device.seek(0, os.SEEK_END)
    else:
        space = os.statvfs(place)
        free = space.f_bavail * space.f_frsize
    ok = True if free > 1 << 30 else None
    return Check("free disk", ok, f"{format_size(free)} at {place}", "" if ok else "little to shrink to: give another --backing")


def _capability(name: str, number: int, advice: str) -> Check:
    ok = True if _has_capability(number) else None
    return Check(name, ok, "yes" if ok else "no", "" if ok else advice)


def _has_capability(number: int) -> bool:
    status = proctext.parse_keyed(Path("/proc/self/status").read_bytes(), b"CapEff:")
    return bool(int(status["CapEff"], 16) >> number & 1)


def _compiled(why_not: str) -> Check:
    if not why_not:
        return Check("compiled store", True, "yes")
    advice = "a store takes a third more CPU: apt-get install gcc python3-dev liblz4-dev libxxhash-dev, and install tmemfs again"
    return Check("compiled store", None, f"no ({why_not})", "" if why_not.startswith("TMEMFS_") else advice)


def _pressure() -> Check:
    """The signals of memory pressure, tried as the daemon does."""
    signals = Signals()
    try:
        ok = True if signals.stalls else None
        return Check(
            "pressure signals", ok, ", ".join(signals.live), "" if ok else f"no {'; '.join(signals.missing)}: boot with psi=1"
        )
    finally:
        signals.close()


def _cgroup() -> Check:
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        return Check("memory cgroups", True, "v2")
    if Path("/sys/fs/cgroup/memory").is_dir():
        return Check("memory cgroups", True, "v1")
    return Check("memory cgroups", None, "none", "only needed to limit programs and for the system tests")


def _zswap() -> Check:
    switch = Path("/sys/module/zswap/parameters/enabled")
    on = switch.exists() and proctext.word_of(switch.read_bytes()) == "Y"
    return Check(
        "zswap", None if on else True, "on" if on else "off", f"pages are compressed twice: echo N > {switch}" if on else ""
    )


def _other_swaps() -> Check:
    others = [entry for entry in swap_entries() if "/loop" not in entry.path]
    found = ", ".join(f"{entry.path} (priority {entry.priority})" for entry in others) or "none"
    high = [entry for entry in others if entry.priority >= 100]
    return Check("other swaps", None if high else True, found, "they are filled first: give a higher --priority" if high else "")


def _kernel_settings() -> Check:
    """What is changed of the machine's settings now, and the administrator's values."""
    try:
        with closing(KernelSettings()) as settings:
            found = settings.findings()
    except OSError as error:
        is_secret = isinstance(error, PermissionError)
        return Check("kernel settings", None, "unknown", "only root may see: run with sudo" if is_secret else str(error))
    return _judged(found)


def _judged(found: Findings) -> Check:
    said = [f"vm.{change.name} {change.now} (yours: {change.administrators})" for change in found.changed]
    said += [f"{found.workers} kernel workers with real-time priority"] if found.workers else []
    if not said:
        return Check("kernel settings", True, "none is changed")
    left = not found.is_in_use
    advice = "left by a daemon that was killed: run 'tmemfs down'" if left else ""
    return Check("kernel settings", None if left else True, ", ".join(said), advice)
