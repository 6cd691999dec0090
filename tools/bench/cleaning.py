"""Reads from RAM with and without the cleaner at work, interleaved on one mount."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Final

from tmemfs.cli.real_pages import RealPages
from tmemfs.system.memory import punch
from tmemfs.units import MIB, PAGE_BYTES
from tools.bench.core import fill, read
from tools.bench.mounts import Mount, mounted

_READS: Final = 10000
_IN_RAM: Final = 8192


@dataclass(frozen=True, slots=True)
class Busy:
    """Medians over rounds in microseconds, the median of the rounds' ratios, and the bytes cleaned meanwhile."""

    idle_p99_us: float
    busy_p99_us: float
    ratio: float
    cleaned_bytes: int


def measure(directory: Path, disk_bytes: int, rounds: int) -> Busy:
    """`rounds` of reads without and with the cleaner at work on half-dead segments."""
    pages, count = RealPages(), disk_bytes * 3 // PAGE_BYTES
    pool = f"{disk_bytes * 2}"
    with mounted(directory, "clean", "--size", str((count + _IN_RAM) * PAGE_BYTES), "--pool-max", pool) as mount:
        mount.write("clean.daily", "0")
        fill(mount, pages, count, 1 << 50, first=_IN_RAM)
        mount.write("shrink", "all")
        _thin_out(mount, _IN_RAM, count)
        fill(mount, pages, _IN_RAM, 1 << 50)
        idle, busy = [], []
        for number in range(rounds):
            idle.append(_p99_us(mount, pages, number))
            mount.write("clean.daily", "max")
            busy.append(_p99_us(mount, pages, number))
            mount.write("clean.daily", "0")
        cleaned = int(mount.stat()["cleaned_bytes"])
        if cleaned < rounds * MIB:
            raise SystemExit(f"the cleaner moved only {cleaned} bytes: give it more that is dead")
    return Busy(median(idle), median(busy), median(b / a for a, b in zip(idle, busy, strict=True)), cleaned)


def _thin_out(mount: Mount, first: int, count: int) -> None:
    """Discard every second page."""
    fd = os.open(mount.mountpoint / "swap", os.O_RDWR)
    try:
        for slot in range(first, first + count, 2):
            punch(fd, slot * PAGE_BYTES, PAGE_BYTES)
    finally:
        os.close(fd)


def _p99_us(mount: Mount, pages: RealPages, seed: int) -> float:
    times = sorted(read(mount, pages, Random(seed).choices(range(_IN_RAM), k=_READS)))
    return times[_READS * 99 // 100] * 1e6
