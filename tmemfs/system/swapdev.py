"""Loop devices, swap and mounts of this machine: what util-linux does, with errors that name the next step.

Reads /proc and /sys, which work when a mount is dead, and runs losetup, mkswap, swapon and swapoff. Knows nothing of the store, and
nothing of which mount a command is about (cli/lifecycle.py).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from tmemfs.errors import NoAnswer, Refused
from tmemfs.system.in_time import in_time
from tmemfs.system.memory import available_ram_bytes
from tmemfs.system.proctext import Mount, SwapEntry, parse_backing_file, parse_mounts, parse_swaps, word_of
from tmemfs.units import format_size

SYS_BLOCK: Final = Path("/sys/block")
PROC_SWAPS: Final = Path("/proc/swaps")
PROC_MOUNTS: Final = Path("/proc/self/mountinfo")
_POLL_S: Final = 0.2
_MNT_DETACH: Final = 2
_LOOP_GET_STATUS64: Final = 0x4C05
#: struct loop_info64 (include/uapi/linux/loop.h): it begins with the device and the inode of the backing file.
_LOOP_INFO_BYTES: Final = 232
#: As many symbolic links as the kernel follows.
_MOST_LINKS: Final = 40
#: Another process's swapoff that swaps nothing in for this long is not making progress.
_NO_PROGRESS_S: Final = 60.0
_libc = ctypes.CDLL(None, use_errno=True)
#: What swapping in needs per byte of pages: 5 % more, for page tables and the reclaim that goes on meanwhile.
SWAP_IN_MARGIN: Final = 1.05


class FileId(NamedTuple):
    """What identifies a file in any mount namespace."""

    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class Loop:
    """An attached loop device, the kernel's sequence number of this attachment (diskseq), and the path it was attached to."""

    device: str
    diskseq: int
    path: str


def swap_entries(table: Path = PROC_SWAPS) -> list[SwapEntry]:
    """The swaps that are on."""
    return parse_swaps(table.read_bytes())


def swap_on_device(device: str) -> SwapEntry | None:
    """The swap on `device`, if it is on."""
    return next((entry for entry in swap_entries() if entry.path == device), None)


def loop_devices(sys_block: Path = SYS_BLOCK) -> list[Loop]:
    """All loop devices that are attached to something."""
    found = []
    for backing in sorted(sys_block.glob("loop*/loop/backing_file")):
        disk = backing.parent.parent
        # it may be detached meanwhile
        with suppress(OSError):
            path = parse_backing_file(backing.read_bytes())
            found.append(Loop(f"/dev/{disk.name}", _diskseq(disk), path))
    return found


def _diskseq(disk: Path) -> int:
    """The disk's sequence number, 0 before Linux 5.15, which has none."""
    try:
        return int(word_of((disk / "diskseq").read_bytes()))
    except FileNotFoundError:
        return 0


def loop_devices_of(image: Path, sys_block: Path = SYS_BLOCK) -> list[str]:
    """Loop devices attached to the path `image`, whether or not its mount still lives. Asks the daemon nothing."""
    wanted = os.fspath(resolved(image.parent) / image.name)
    return [loop.device for loop in loop_devices(sys_block) if loop.path == wanted]


def file_behind(device: str) -> FileId | None:
    """The file that a loop device is attached to, None if its daemon does not answer in time.

    The kernel asks the file's daemon for its attributes. Never to be called in a thread that answers such requests.
    """
    try:
        return in_time(lambda: _loop_status(device))
    except NoAnswer:
        return None


def _loop_status(device: str) -> FileId | None:
    buffer = bytearray(_LOOP_INFO_BYTES)
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.ioctl(fd, _LOOP_GET_STATUS64, buffer)
    except OSError:
        return None
    finally:
        os.close(fd)
    return FileId(*struct.unpack_from("QQ", buffer))


def mounts(table: Path = PROC_MOUNTS) -> list[Mount]:
    """What is mounted in this namespace, the lower ones first."""
    return parse_mounts(table.read_bytes())


def is_mounted(mountpoint: Path, table: Path = PROC_MOUNTS) -> bool:
    """Whether anything is mounted at `mountpoint`."""
    return mount_type(mountpoint, table) is not None


def mount_type(mountpoint: Path, table: Path = PROC_MOUNTS) -> str | None:
    """Type of the file system at `mountpoint`, or None."""
    mount = mount_at(mountpoint, table)
    return mount.kind if mount else None


def mount_at(mountpoint: Path, table: Path = PROC_MOUNTS) -> Mount | None:
    """The uppermost mount at `mountpoint`, or None."""
    wanted = os.fspath(resolved(mountpoint))
    return next((mount for mount in reversed(mounts(table)) if mount.mountpoint == wanted), None)


def resolved(mountpoint: Path) -> Path:
    """`mountpoint` as the kernel's tables name it, without symbolic links.

    The mountpoint itself gets no stat(2): that is a request to its daemon, which may be dead or may be the caller.
    """
    place = mountpoint.absolute()
    for _ in range(_MOST_LINKS):
        # realpath(3) for the parents alone; readlink(2) on a mountpoint fails in the kernel, without a request
        place = Path(os.path.realpath(place.parent)) / place.name
        try:
            place = place.parent / os.readlink(place)
        except OSError:
            break
    return place


def mount_is_dead(mountpoint: Path) -> bool:
    """Whether the daemon of the mount has ended. One that does not answer in time has not."""
    try:
        return in_time(lambda: _is_dead(mountpoint))
    except NoAnswer:
        return False


def _is_dead(mountpoint: Path) -> bool:
    try:
        # not stat(2), which the kernel answers from its cache long after the daemon has ended
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def unmount(mountpoint: Path, lazy: bool = False) -> None:
    """Unmount; with `lazy`, at once, even if it is still in use. Raises OSError."""
    if _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH if lazy else 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(mountpoint))


def attach(image: Path) -> str:
    """Attach a loop device with direct I/O to `image`, or find the one that is attached; returns its path. Raises Refused."""
    # --nooverlap: two loop devices over one image would be two swaps over the same pages; losetup checks once more itself.
    # --direct-io: otherwise each page is in the page cache too, which takes the memory that swapping is to free.
    options = ("--find", "--show", "--nooverlap", "--direct-io=on")
    return _run("losetup", *options, os.fspath(image), hint="see tmemfs doctor").strip("\n")


def set_no_merges(device: str, value: str, sys_block: Path = SYS_BLOCK) -> str:
    """Write `nomerges` of a device's queue: 2 keeps the kernel from merging requests, 0 has it merge. Returns what it was.

    Raises OSError.
    """
    file = sys_block / Path(device).name / "queue/nomerges"
    before = word_of(file.read_bytes())
    if before != value:
        file.write_text(value)
    return before


def detach(device: str) -> None:
    """Detach a loop device. Raises Refused."""
    # a daemon that found damage, and was killed, leaves it unmerged for whatever is attached to it next
    with suppress(OSError):
        set_no_merges(device, "0")
    _run("losetup", "--detach", device, hint="see what uses it with lsof")


def make_swap(device: str) -> None:
    """Write a swap header. Raises Refused."""
    _run("mkswap", device, hint="see the daemon's log")


def swap_on(device: str, priority: int) -> None:
    """Turn the swap on, with discard, by which the kernel says which slots are free again. Raises Refused."""
    _run("swapon", "--discard", "--priority", str(priority), device, hint="see dmesg")


def swap_off(device: str, progress: Callable[[int], None] = lambda _: None) -> None:
    """Turn the swap off, which loads every page in it to RAM; calls `progress` with the bytes left. Raises Refused.

    If another process is turning it off already, this waits for it.
    """
    used, changed = -1, time.monotonic()
    while (failed := _swapoff(device, progress)) and (entry := swap_on_device(device)):
        # the kernel returns EINVAL for a swap that another process is turning off, and still lists it
        if os.strerror(errno.EINVAL) not in failed or time.monotonic() - changed > _NO_PROGRESS_S:
            raise Refused(f"swapoff {device} failed ({failed}): free memory or add another swap, then try again")
        if entry.used_bytes != used:
            used, changed = entry.used_bytes, time.monotonic()
        progress(entry.used_bytes)
        time.sleep(_POLL_S)


def _swapoff(device: str, progress: Callable[[int], None]) -> str:
    """Run swapoff once; returns why it failed, or nothing."""
    # in a process of its own: when memory runs out, the kernel first kills the process that turns a swap off, and this one has
    # to clean up
    try:
        process = subprocess.Popen(["swapoff", device], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=_environment())
    except FileNotFoundError:
        raise _not_installed("swapoff") from None
    while True:
        try:
            _, said = process.communicate(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            if entry := swap_on_device(device):
                progress(entry.used_bytes)
            continue
        return (os.fsdecode(said).strip() or f"ended with {process.returncode}") if process.returncode else ""


def refuse_if_too_full(entry: SwapEntry) -> None:
    """Raise Refused if RAM and the other swaps cannot take what is in `entry`."""
    free = available_ram_bytes() + free_elsewhere_bytes(entry)
    if entry.used_bytes * SWAP_IN_MARGIN > free:
        raise Refused(
            f"{format_size(entry.used_bytes)} are swapped out and {format_size(free)} of RAM and other swap are free: "
            "end some programs or add another swap first, or use --force"
        )


def free_elsewhere_bytes(entry: SwapEntry) -> int:
    """The free bytes of the other swaps."""
    return sum(other.size_bytes - other.used_bytes for other in swap_entries() if other.path != entry.path)


def _run(*command: str, hint: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, env=_environment(), check=False)
    except FileNotFoundError:
        raise _not_installed(command[0]) from None
    if done.returncode:
        raise Refused(f"{' '.join(command)} failed ({os.fsdecode(done.stderr).strip()}): {hint}")
    return os.fsdecode(done.stdout)


def _environment() -> dict[str, str]:
    """The environment in which these programs print English: their messages are compared."""
    return {**os.environ, "LC_ALL": "C"}


def _not_installed(program: str) -> Refused:
    return Refused(f"{program} is not installed: apt-get install util-linux mount")
