"""Loop devices, swap and mounts of this machine: what util-linux does, with errors that name the next step.

Reads /proc and /sys (which work when a mount is dead), runs losetup, mkswap, swapon and swapoff. Knows nothing of the store.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tmemfs.errors import Refused
from tmemfs.host.memory import available_ram_bytes
from tmemfs.units import format_size

SYS_BLOCK: Final = Path("/sys/block")
PROC_SWAPS: Final = Path("/proc/swaps")
PROC_MOUNTS: Final = Path("/proc/self/mounts")
_POLL_S: Final = 0.2
_MNT_DETACH: Final = 2
#: How the kernel's tables write what would part a line.
_ESCAPES: Final = {" ": "\\040", "\t": "\\011", "\n": "\\012", "\\": "\\134"}
_libc = ctypes.CDLL(None, use_errno=True)
#: What taking pages back needs beside the pages: page tables and the reclaim that goes on meanwhile.
_MARGIN: Final = 1.05


@dataclass(frozen=True, slots=True)
class SwapEntry:
    """One line of /proc/swaps."""

    path: str
    size_bytes: int
    used_bytes: int
    priority: int


def swap_entries(table: Path = PROC_SWAPS) -> list[SwapEntry]:
    """The swaps that are on."""
    rows = [line.split() for line in table.read_text().splitlines()[1:]]
    return [SwapEntry(path, int(size) << 10, int(used) << 10, int(priority)) for path, _, size, used, priority in rows]


def swap_on_device(device: str) -> SwapEntry | None:
    """The swap on `device`, if it is on."""
    return next((entry for entry in swap_entries() if entry.path == device), None)


def loop_devices_of(image: Path, sys_block: Path = SYS_BLOCK) -> list[str]:
    """Loop devices attached to `image`, whether or not its mount still lives."""
    devices, wanted = [], os.fspath(_resolved(image.parent) / image.name)
    for backing in sorted(sys_block.glob("loop*/loop/backing_file")):
        try:
            name = backing.read_text().strip().removesuffix(" (deleted)")
        except OSError:
            continue
        if name == wanted:
            devices.append(f"/dev/{backing.parent.parent.name}")
    return devices


def is_mounted(mountpoint: Path, table: Path = PROC_MOUNTS) -> bool:
    """Whether anything is mounted at `mountpoint`."""
    return mount_type(mountpoint, table) is not None


def mount_type(mountpoint: Path, table: Path = PROC_MOUNTS) -> str | None:
    """Type of the file system at `mountpoint`, or None."""
    wanted = "".join(_ESCAPES.get(character, character) for character in str(_resolved(mountpoint)))
    kinds = [fields[2] for fields in map(str.split, table.read_text().splitlines()) if fields[1] == wanted]
    return kinds[-1] if kinds else None


def _resolved(mountpoint: Path) -> Path:
    """`mountpoint` as the kernel's tables name it, without symbolic links.

    It is not asked what it is itself: that is a request to its daemon, which may be dead, or the one that asks.
    """
    place = Path(os.path.realpath(mountpoint.absolute().parent)) / mountpoint.name
    try:
        return _resolved(place.parent / os.readlink(place))
    except OSError:
        return place


def mount_is_dead(mountpoint: Path) -> bool:
    """Whether the daemon behind the mount has gone."""
    try:
        os.stat(mountpoint)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def unmount(mountpoint: Path, lazy: bool = False) -> None:
    """Unmount; `lazy` detaches at once what is still in use. Raises OSError."""
    if _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH if lazy else 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(mountpoint))


def attach(image: Path) -> str:
    """Attach a loop device with direct I/O to `image`; gives its path. Raises Refused."""
    return _run("losetup", "--find", "--show", "--direct-io=on", os.fspath(image), hint="see tmemfs doctor").strip()


def detach(device: str) -> None:
    """Detach a loop device. Raises Refused."""
    _run("losetup", "--detach", device, hint="see what uses it with lsof")


def make_swap(device: str) -> None:
    """Write a swap header. Raises Refused."""
    _run("mkswap", device, hint="see the daemon's log")


def swap_on(device: str, priority: int) -> None:
    """Turn the swap on, with discard, which is how freed slots become known. Raises Refused."""
    _run("swapon", "--discard", "--priority", str(priority), device, hint="see dmesg")


def swap_off(device: str, progress: Callable[[int], None] | None = None) -> None:
    """Turn the swap off; every page in it comes back to RAM. `progress` is told the bytes left. Raises Refused."""
    try:
        process = subprocess.Popen(["swapoff", device], stderr=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise _not_installed("swapoff") from None
    while True:
        try:
            _, said = process.communicate(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            entry = swap_on_device(device)
            if progress and entry:
                progress(entry.used_bytes)
            continue
        if process.returncode:
            raise Refused(f"swapoff {device} failed ({said.strip()}): free memory or add another swap, then try again")
        return


def refuse_if_too_full(entry: SwapEntry) -> None:
    """Raise Refused if RAM and the other swaps cannot take back what is in `entry`."""
    others = sum(other.size_bytes - other.used_bytes for other in swap_entries() if other.path != entry.path)
    room = available_ram_bytes() + others
    if entry.used_bytes * _MARGIN > room:
        raise Refused(
            f"{format_size(entry.used_bytes)} are swapped out and {format_size(room)} of RAM and other swap are free: "
            "end some programs or add another swap first, or use --force"
        )


def _run(*command: str, hint: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        raise _not_installed(command[0]) from None
    if done.returncode:
        raise Refused(f"{' '.join(command)} failed ({done.stderr.strip()}): {hint}")
    return done.stdout


def _not_installed(program: str) -> Refused:
    return Refused(f"{program} is not installed: apt-get install util-linux mount")
