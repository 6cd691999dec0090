"""The doctor: what this machine has of what tmemfs needs, and what to do about what is missing. Changes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from tmemfs.cli.checks import Check, daemons
from tmemfs.cli.control_io import read_in_time
from tmemfs.cli.health import look
from tmemfs.cli.targets import FS_TYPE
from tmemfs.errors import Refused, TmemfsError
from tmemfs.system import cpu_latency, proctext, swapdev
from tmemfs.system.capabilities import CAP_IPC_LOCK, CAP_SYS_NICE, CAP_SYS_RESOURCE, has_capability, is_root
from tmemfs.system.kernel_settings import Findings, KernelSettings
from tmemfs.system.memory import total_ram_bytes
from tmemfs.system.pressure_signals import PressureSignals
from tmemfs.system.swapdev import swap_entries
from tmemfs.units import format_size

_PACKAGES: Final = ("trio", "pyfuse3", "lz4", "zstandard", "xxhash", "cryptography")
_PROGRAMS: Final = ("losetup", "mkswap", "swapon", "swapoff")


def examine(backing: Path, backing_refused: str = "", not_compiled: str = "") -> list[Check]:
    """The findings of all checks, the essential ones first.

    `backing_refused` says why the backing cannot be used, `not_compiled` why the store's compiled functions are not used.
    """
    lock, resource, nice = (
        "the pool may be swapped out itself: run with CAP_IPC_LOCK",
        "run with CAP_SYS_RESOURCE, or protect the daemon from outside",
        "the daemon gets no memory that others do not: run with CAP_SYS_NICE",
    )
    checks: tuple[tuple[str, Callable[[str], Check]], ...] = (
        ("root", _root),
        ("kernel", _kernel),
        ("FUSE", _fuse),
        ("loop", _loop),
        ("programs", _programs),
        ("Python packages", _packages),
        ("backing", lambda name: _backing(name, backing, backing_refused)),
        ("free disk", lambda name: _disk(name, backing)),
        ("lock memory", lambda name: _capability(name, CAP_IPC_LOCK, lock)),
        ("io_flusher, oom score", lambda name: _capability(name, CAP_SYS_RESOURCE, resource)),
        ("real-time", lambda name: _capability(name, CAP_SYS_NICE, nice)),
        ("compiled store", lambda name: _compiled(name, not_compiled)),
        ("pressure signals", _pressure),
        ("memory cgroups", _cgroup),
        ("zswap", _zswap),
        ("other swaps", _other_swaps),
        ("wake-ups", _wake_ups),
        ("kernel settings", _kernel_settings),
        ("damage", _damage),
        ("RAM", lambda name: Check(name, True, format_size(total_ram_bytes()))),
    )
    return [_tried(name, check) for name, check in checks] + daemons()


def _tried(name: str, check: Callable[[str], Check]) -> Check:
    """What `check` finds, or that it is unknown."""
    # an ordinary user may not read everything, and one check that fails must not hide the others
    try:
        return check(name)
    except OSError as error:
        return Check(name, None, f"unknown ({error.strerror})", "run it as root")


def _root(name: str) -> Check:
    ok = is_root()
    return Check(name, ok, "yes" if ok else "no", "" if ok else "mounting and swapon need root: run with sudo")


def _kernel(name: str) -> Check:
    release = os.uname().release
    # '6.18-rc1+' and the like: only the digits
    major, minor = (int("".join(c for c in part if c.isdigit()) or 0) for part in release.split(".")[:2])
    ok = (major, minor) >= (5, 14)
    return Check(name, ok, release, "" if ok else "the reserve is faulted in by MADV_POPULATE_WRITE: use Linux 5.14 or later")


def _fuse(name: str) -> Check:
    ok = Path("/dev/fuse").exists() and b"\tfuse\n" in Path("/proc/filesystems").read_bytes()
    return Check(name, ok, "yes" if ok else "no", "" if ok else "load the module: modprobe fuse")


def _loop(name: str) -> Check:
    ok = Path("/dev/loop-control").exists()
    found = "yes, discard reaches the store with the relay" if ok else "no"
    return Check(name, ok, found, "" if ok else "load the module: modprobe loop")


def _programs(name: str) -> Check:
    missing = [program for program in _PROGRAMS if not shutil.which(program)]
    advice = "apt-get install util-linux mount" if missing else ""
    return Check(name, not missing, "missing: " + " ".join(missing) if missing else " ".join(_PROGRAMS), advice)


def _packages(name: str) -> Check:
    missing = [package for package in _PACKAGES if not find_spec(package)]
    advice = "run 'make setup', or pip install tmemfs" if missing else ""
    return Check(name, not missing, "missing: " + " ".join(missing) if missing else " ".join(_PACKAGES), advice)


def _backing(name: str, path: Path, refused: str) -> Check:
    # the message of a refusal says what is wrong, and after a colon what to do
    found, _, advice = refused.partition(": ")
    return Check(name, not refused, found or str(path), advice)


def _disk(name: str, backing: Path) -> Check:
    place, free = _free_bytes(backing)
    # 1 GiB: about the least that is worth a swap on disk
    ok = True if free > 1 << 30 else None
    return Check(name, ok, f"{format_size(free)} at {place}", "" if ok else "little to shrink to: give another --backing")


def _free_bytes(backing: Path) -> tuple[Path, int]:
    """The existing part of `backing`, and the bytes free there. Raises OSError."""
    place = next(parent for parent in (backing, *backing.absolute().parents) if os.path.lexists(parent))
    # statvfs(2) of a device file tells of the file system of /dev
    if not place.is_block_device():
        space = os.statvfs(place)
        return place, space.f_bavail * space.f_frsize
    with open(place, "rb") as device:
        return place, device.seek(0, os.SEEK_END)


def _capability(name: str, number: int, advice: str) -> Check:
    ok = True if has_capability(number) else None
    return Check(name, ok, "yes" if ok else "no", "" if ok else advice)


def _compiled(name: str, why_not: str) -> Check:
    if not why_not:
        return Check(name, True, "yes")
    # somebody who turned it off by TMEMFS_PURE_PYTHON needs no advice
    advice = "a store takes a third more CPU: apt-get install gcc python3-dev liblz4-dev libxxhash-dev, and install tmemfs again"
    return Check(name, None, f"no ({why_not})", "" if why_not.startswith("TMEMFS_") else advice)


def _pressure(name: str) -> Check:
    """Which signals of memory pressure work, found out as the daemon does it."""
    signals = PressureSignals()
    try:
        ok = True if signals.stalls else None
        return Check(name, ok, ", ".join(signals.live), "" if ok else f"no {'; '.join(signals.missing)}: boot with psi=1")
    finally:
        signals.close()


def _cgroup(name: str) -> Check:
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        return Check(name, True, "v2")
    if Path("/sys/fs/cgroup/memory").is_dir():
        return Check(name, True, "v1")
    return Check(name, None, "none", "only needed to limit programs and for the system tests")


def _zswap(name: str) -> Check:
    switch = Path("/sys/module/zswap/parameters/enabled")
    on = switch.exists() and proctext.word_of(switch.read_bytes()) == "Y"
    return Check(name, None if on else True, "on" if on else "off", f"pages are compressed twice: echo N > {switch}" if on else "")


def _other_swaps(name: str) -> Check:
    others = [entry for entry in swap_entries() if "/loop" not in entry.path]
    found = ", ".join(f"{entry.path} (priority {entry.priority})" for entry in others) or "none"
    # the kernel fills the swap with the highest priority first; 100 is what `up` gives
    high = [entry for entry in others if entry.priority >= 100]
    return Check(name, None if high else True, found, "they are filled first: give a higher --priority" if high else "")


def _wake_ups(name: str) -> Check:
    """What idle CPUs do, and whether they can be kept awake while pages are swapped."""
    idle = cpu_latency.idle()
    said = f"idle driver {idle.driver}, governor {idle.governor}"
    said += f" with guest_halt_poll_ns={idle.poll_ns}" if idle.poll_ns is not None else ""
    # a guest whose CPUs halt at once pays an exit to its host for each wake-up
    polls = f"echo 200000 > {cpu_latency.POLL_NS} does nearly the same for all programs" if idle.poll_ns == 0 else ""
    try:
        cpu_latency.check_device()
    except Refused as error:
        found, _, advice = str(error).partition(": ")
        advice = "; ".join(part for part in (advice, polls) if part) if is_root() else "only root may: run with sudo"
        return Check(name, None, f"{said}; {found}", advice)
    return Check(name, True, f"{said}; kept awake in bursts", polls)


def _kernel_settings(name: str) -> Check:
    """Which settings of the kernel are changed now, and the administrator's values."""
    try:
        with closing(KernelSettings()) as settings:
            found = settings.findings()
    except OSError as error:
        is_secret = isinstance(error, PermissionError)
        return Check(name, None, "unknown", "only root may see: run with sudo" if is_secret else str(error))
    return _judged(name, found)


def _judged(name: str, found: Findings) -> Check:
    said = [f"vm.{change.name} {change.now} (yours: {change.administrators})" for change in found.changed]
    said += [f"{found.workers} kernel workers with real-time priority"] if found.workers else []
    if not said:
        return Check(name, True, "none is changed")
    # while a daemon lives, changed settings are as they should be
    left = not found.is_in_use
    advice = "left by a daemon that was killed: run 'tmemfs down'" if left else ""
    return Check(name, None if left else True, ", ".join(said), advice)


def _damage(name: str) -> Check:
    """Damage that daemons have found and nobody has acknowledged."""
    places = [Path(mount.mountpoint) for mount in swapdev.mounts() if mount.kind == FS_TYPE]
    said = {place: found for place in places if (found := _unacknowledged(place))}
    advice = "look into it, then run " + " and ".join(f"'tmemfs doctor --acknowledge {place}'" for place in said)
    return Check(name, None if said else True, "; ".join(said.values()) or "none is reported", advice if said else "")


def _unacknowledged(mountpoint: Path) -> str:
    """What control/damage reports, if anything: nothing also for a mount that cannot be asked."""
    try:
        if health := look(mountpoint):
            health.refuse_if_silent()  # another check says so
        lines = read_in_time(mountpoint, "damage").splitlines()  # a daemon that is stopped must not hold the doctor up
    except (TmemfsError, OSError):
        return ""
    found = [line for line in lines if not line.endswith(" 0")]
    return f"{mountpoint}: {', '.join(found)}" if found else ""
