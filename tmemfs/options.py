"""What a daemon is asked to serve, and whether it can: the checks that are made before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tmemfs.errors import BadValue, Busy, Refused
from tmemfs.fuse.mount import FUSE_DEVICE
from tmemfs.jobs.kernel_tuning import parse_tuning
from tmemfs.jobs.latency import parse_latency
from tmemfs.jobs.limits import parse_pool_max
from tmemfs.store.codec import parse_codec
from tmemfs.store.segments import RECORD_BYTES
from tmemfs.store.slots import SLOT_BYTES
from tmemfs.system import memory
from tmemfs.system.capabilities import require_root
from tmemfs.system.cpu_latency import check_device
from tmemfs.system.swapdev import is_mounted
from tmemfs.tiers.file import check_backing
from tmemfs.units import MIB, PAGE_BYTES, SEGMENT_BYTES, format_size, parse_size

#: Slots are numbered by 32 bits (store/record.py).
_MOST_SWAP_BYTES: Final = PAGE_BYTES << 32


@dataclass(frozen=True, slots=True)
class Options:
    """What to mount, and how. `backing` None: pages stay in RAM. Sizes as text are resolved here.

    `watchdog_s` is how long requests may wait for a worker that answers none, 0 for ever.
    `encrypt`: what goes to the backing is encrypted.
    `log` is the file behind standard output, which SIGHUP opens again; None: it is no file of ours.
    """

    mountpoint: Path
    swap_bytes: int
    pool_max: str = "25%"
    backing: Path | None = None
    backing_max: str = "max"
    codec: str = "lz4"
    log: Path | None = None
    kernel_tuning: str = "auto"
    watchdog_s: float = 30.0
    encrypt: bool = True
    latency: str = "auto"


def check(options: Options) -> None:
    """Raise BadValue, OutOfRange, Refused or Busy for what `serve` would stumble over; changes nothing."""
    _check_values(options)  # first: a mistake in the command is told also to those who are not root
    require_root()
    if not FUSE_DEVICE.exists():
        raise Refused(f"{FUSE_DEVICE} is not there: load the fuse module (modprobe fuse)")
    _check_mountpoint(options.mountpoint)
    if options.backing is not None:
        check_backing(options.backing)
    if options.latency == "always":
        check_device()


def _check_values(options: Options) -> None:
    size = options.swap_bytes
    if size <= 0 or size % PAGE_BYTES:
        raise BadValue(f"a swap of {size} bytes is not a positive multiple of the page ({PAGE_BYTES}): give for example 8G")
    if size > _MOST_SWAP_BYTES:
        raise BadValue(f"a swap of {size} bytes has more than 2^32 pages: give at most {_MOST_SWAP_BYTES}")
    _check_tables(size, memory.total_ram_bytes())
    parse_codec(options.codec)
    parse_pool_max(options.pool_max, memory.total_ram_bytes())
    parse_size(options.backing_max, 1 << 60)
    parse_tuning(options.kernel_tuning)
    parse_latency(options.latency)


def _check_tables(swap_bytes: int, ram: int) -> None:
    """Raise BadValue where the tables, which are locked whole, would take more than an eighth of RAM."""
    frames, extents = frames_and_extents(swap_bytes, ram)
    tables = swap_bytes // PAGE_BYTES * SLOT_BYTES + (frames + extents) * RECORD_BYTES
    if tables > ram // 8:
        most = swap_bytes * (ram // 8) // tables * 99 // 100  # part of the segment table does not grow with the size
        raise BadValue(
            f"a swap of {format_size(swap_bytes)} needs tables of {format_size(tables)}, more than an eighth of RAM "
            f"({format_size(ram)}): give a --size of at most {most // MIB}M"
        )


def frames_and_extents(swap_bytes: int, ram: int) -> tuple[int, int]:
    """How many frames and extents a swap of `swap_bytes` may need at most: the segment table has a record for each of them."""
    return min(ram, swap_bytes + swap_bytes // 8) // SEGMENT_BYTES + 64, swap_bytes * 2 // SEGMENT_BYTES + 64


def _check_mountpoint(mountpoint: Path) -> None:
    if is_mounted(mountpoint):
        raise Busy(f"{mountpoint} is taken by a mount: run 'tmemfs down {mountpoint}' first, or give another mountpoint")
    try:
        if not mountpoint.is_dir():
            raise Refused(f"{mountpoint} is not a directory: create it (mkdir -p {mountpoint})")
        if any(mountpoint.iterdir()):
            raise Refused(f"{mountpoint} is not empty: give an empty directory")
    except OSError as error:
        raise Refused(f"cannot use {mountpoint} ({error.strerror}): give another mountpoint") from error
