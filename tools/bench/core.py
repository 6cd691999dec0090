"""Core figures of a real mount: shrink next to fio, single-page reads, the relay next to plain pyfuse3, resident memory."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Final

from tmemfs.cli.real_pages import RealPages
from tmemfs.units import PAGE_BYTES
from tools.bench import plain_fuse
from tools.bench.mounts import Mount, mounted

_BATCH: Final = 64
_SETTLE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Shrink:
    """One `shrink all` and the fio run before it: bytes per second, and bytes written per compressed byte."""

    compressed_rate: float
    original_rate: float
    fio_rate: float
    written_ratio: float

    @property
    def share(self) -> float:
        """The rate as a share of fio's."""
        return self.compressed_rate / self.fio_rate


@dataclass(frozen=True, slots=True)
class Reads:
    """Random single-page reads from disk: blocks per read, and latency."""

    blocks_mean: float
    p50_us: float
    p99_us: float


@dataclass(frozen=True, slots=True)
class Datapath:
    """Random 4 KiB reads through the loop device, from RAM: medians over rounds."""

    p50_us: float
    p99_us: float
    cpu_us: float


@dataclass(frozen=True, slots=True)
class Footprint:
    """Resident bytes of the daemon beyond pool and tables, after all of the above."""

    beyond: int


def shrinks(directory: Path, pool_bytes: int, rounds: int) -> tuple[list[Shrink], Reads, Footprint]:
    """Fill a pool, shrink it to nothing, fio before each; then read single pages back."""
    pages, most = RealPages(), pool_bytes * 3 // PAGE_BYTES
    done: list[Shrink] = []
    pool = f"{pool_bytes * 9 // 8}"
    with mounted(directory, "shrink", "--size", str(most * PAGE_BYTES), "--pool-max", pool) as mount:
        # no background write-back: the shrink has to find everything in RAM
        mount.write("pool.high", pool)
        for _ in range(rounds):
            count = fill(mount, pages, most, pool_bytes)
            compressed = int(mount.stat()["compressed_bytes"])
            with _fio(directory) as fio_rate:
                mount.write("shrink", "all")
            answer = mount.flat("shrink")
            seconds, written = float(answer["seconds"]), int(answer["written"])
            done.append(Shrink(written / seconds, count * PAGE_BYTES / seconds, fio_rate, written / compressed))
        return done, _single_reads(mount, pages, count, 1000), _footprint(mount)


def datapaths(directory: Path, rounds: int) -> dict[str, Datapath]:
    """The relay, and the image served by pyfuse3, mounted at once and read alternately."""
    pages, count, reads = RealPages(), 8192, 1000
    with (
        mounted(directory, "relay", "--size", "256M", "--pool-max", "256M") as relay,
        plain_fuse.mounted(directory, "plain", 256 << 20, "256M") as plain,
    ):
        contenders = {"relay": relay, "pyfuse3": plain}
        seen: dict[str, list[Datapath]] = {name: [] for name in contenders}
        for mount in contenders.values():
            fill(mount, pages, count, 1 << 40)
        for number in range(rounds):
            for name, mount in contenders.items():
                before = mount.cpu_s()
                times = read(mount, pages, Random(number).choices(range(count), k=reads))
                cpu_us = (mount.cpu_s() - before) / reads * 1e6
                seen[name].append(Datapath(median(times) * 1e6, sorted(times)[reads * 99 // 100] * 1e6, cpu_us))
    return {
        name: Datapath(*(median(getattr(run, field) for run in runs) for field in ("p50_us", "p99_us", "cpu_us")))
        for name, runs in seen.items()
    }


def fill(mount: Mount, pages: RealPages, most: int, pool_bytes: int, first: int = 0) -> int:
    """Store pages from slot `first` on until the pool holds `pool_bytes`, or `most` of them; their number."""
    fd = os.open(mount.mountpoint / "swap", os.O_WRONLY)
    try:
        for done in range(0, most, _BATCH):
            slot = first + done
            os.pwrite(fd, b"".join(pages.page(slot + at) for at in range(_BATCH)), slot * PAGE_BYTES)
            # reading a control file for each batch would take longer than storing it
            if not done % (64 * _BATCH) and int(mount.stat()["pool_used"]) >= pool_bytes:
                return done + _BATCH
    finally:
        os.close(fd)
    return most


@contextmanager
def _fio(directory: Path) -> Iterator[float]:
    """Bytes per second that fio writes sequentially: O_DIRECT, 1 MiB, to a new file on the same file system.

    The file is removed after the comparison: a file system that discards is busy with that for a while. Before, the file system has
    time to become idle.
    """
    # dirty pages of others would be written meanwhile
    os.sync()
    time.sleep(_SETTLE_S)
    file = directory / "fio"
    command = ["fio", "--name=seq", f"--filename={file}", "--rw=write", "--bs=1M", "--size=512M", "--direct=1",
               "--ioengine=psync", "--output-format=json"]  # fmt: skip
    try:
        answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        yield float(answer["jobs"][0]["write"]["bw_bytes"])
    finally:
        file.unlink(missing_ok=True)


def read(mount: Mount, pages: RealPages, slots: list[int]) -> list[float]:
    """Seconds of each single-page read, every page verified."""
    times = []
    fd = os.open(mount.device, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, PAGE_BYTES) as page:
            for slot in slots:
                began = time.perf_counter()
                os.preadv(fd, [page], slot * PAGE_BYTES)
                times.append(time.perf_counter() - began)
                # outside the timed part
                if page[:] != pages.page(slot):
                    raise SystemExit(f"bug in tmemfs: page {slot} was read with wrong content; please report it")
    finally:
        os.close(fd)
    return times


def _single_reads(mount: Mount, pages: RealPages, count: int, reads: int) -> Reads:
    before = mount.stat()
    times = sorted(read(mount, pages, Random(1).sample(range(count), reads)))
    after = mount.stat()
    read_bytes, calls = (int(after[key]) - int(before[key]) for key in ("disk_read_bytes", "disk_reads"))
    return Reads(read_bytes / PAGE_BYTES / calls, times[reads // 2] * 1e6, times[reads * 99 // 100] * 1e6)


def _footprint(mount: Mount) -> Footprint:
    stat = mount.stat()
    resident = sum(int(stat[f"resident_{kind}"]) for kind in ("anon", "file", "shmem"))
    return Footprint(resident - int(stat["pool_resident"]) - int(stat["table_bytes"]))
