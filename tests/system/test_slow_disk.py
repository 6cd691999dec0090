"""A disk that takes few bytes per second: write-back keeps it busy, and loads from it do not wait for the writes."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Final

import pytest

from tests.mounted import Place, mounted
from tests.parts import page_of
from tests.waiting import HANG_S, wait_until
from tmemfs.units import MIB, PAGE_BYTES
from tools.bench.accounts import disk_of

pytestmark = pytest.mark.system

_LIMITS: Final = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")
#: Bytes per second that the disk takes.
RATE: Final = 20_000_000
LEAST_SHARE: Final = 0.9
MOST_P99: Final = 2.0
#: A busy machine may take the processor from either side in any one round.
ROUNDS: Final = 8
POOL: Final = 64 * MIB
REQUEST_PAGES: Final = 64


@contextmanager
def write_limited(directory: Path) -> Iterator[None]:
    """The disk of `directory` takes RATE; it is as it was at the end."""
    if not _LIMITS.exists():
        pytest.skip("needs the throttle of the blkio controller, version 1, for all that is in no group")
    disk = disk_of(directory)
    try:
        _LIMITS.write_text(f"{disk} {RATE}")
    except OSError as error:
        pytest.skip(f"the disk {disk} cannot be limited ({error.strerror}): give pytest a --basetemp on a whole disk")
    try:
        yield
    finally:
        _LIMITS.write_text(f"{disk} 0")


@contextmanager
def image_of(place: Place) -> Iterator[int]:
    fd = os.open(place.image, os.O_RDWR | os.O_DIRECT)
    try:
        yield fd
    finally:
        os.close(fd)


def aligned(content: bytes) -> mmap.mmap:
    """A copy of `content` as direct I/O needs it."""
    found = mmap.mmap(-1, len(content))
    found[:] = content
    return found


@contextmanager
def meanwhile(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """`work` in a thread, until the event that it is given is set."""
    end = threading.Event()
    thread = threading.Thread(target=work, args=(end,))
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(HANG_S)


@pytest.mark.parametrize("encrypt", ["on", "off"])
def test_stores_that_fill_the_pool_keep_a_slow_disk_busy(tmp_path: Path, encrypt: str) -> None:
    """In one of the rounds compressed bytes reach it at nine tenths of what it takes."""
    data = aligned(b"".join(page_of("half", seed) for seed in range(REQUEST_PAGES)))
    with mounted(tmp_path, "--encrypt", encrypt, size="1G", pool_max=f"{POOL // MIB}M") as place, image_of(place) as image:

        def store(end: threading.Event) -> None:
            while not end.is_set():
                for offset in range(0, 768 * MIB, len(data)):
                    if end.is_set():
                        return
                    os.pwrite(image, data, offset)

        shares = list[float]()
        with write_limited(tmp_path), meanwhile(store):
            wait_until(lambda: place.number("bytes_written"))
            while len(shares) < ROUNDS:
                shares.append(_rate(place) / RATE)
                if shares[-1] >= LEAST_SHARE:
                    break
            full = place.number("pool_current") / POOL
        print(f"shares {shares}, pool at {full:.2f} of its limit")
        assert max(shares) >= LEAST_SHARE, (shares, place.flat())
        assert place.flat("events")["stores_refused"] == "0" and place.state == "running"


def _rate(place: Place) -> float:
    """Bytes per second that were written back, over a second or more."""
    began, before = time.monotonic(), place.number("bytes_written")
    wait_until(lambda: place.number("bytes_written") >= before + RATE)
    written = place.number("bytes_written") - before
    return written / (time.monotonic() - began)


@pytest.mark.parametrize("encrypt", ["on", "off"])
def test_a_load_does_not_wait_for_the_writes_of_a_shrink(tmp_path: Path, encrypt: str) -> None:
    """In one of the rounds the p99 of loads beside them is at most twice that without."""
    ratios = list[float]()
    for number in range(ROUNDS):
        directory = tmp_path / str(number)
        directory.mkdir()
        ratios.append(_p99_ratio(directory, encrypt))
        if ratios[-1] <= MOST_P99:
            return
    pytest.fail(f"loads waited in every round: {ratios}")


def _p99_ratio(directory: Path, encrypt: str) -> float:
    segments, on_disk = 128, 32
    with mounted(directory, "--encrypt", encrypt, size="256M", pool_max="160M") as place, image_of(place) as image:
        place.write("pool.high", "max")
        for first in range(0, segments * MIB, MIB):
            os.pwrite(image, aligned(Random(first).randbytes(MIB)), first)
        place.write("shrink", f"{on_disk}M")
        offsets = range(0, (on_disk - 2) * MIB, PAGE_BYTES)
        quiet = _loads(image, offsets, lambda: False, 3000)
        before = place.number("loads_disk")
        with write_limited(directory):
            shrink = threading.Thread(target=_shrink, args=(place, "40M"))
            shrink.start()
            busy = _loads(image, offsets, lambda: not shrink.is_alive(), 1 << 30)
            shrink.join(HANG_S)
        assert place.number("loads_disk") - before >= len(busy)
        ratio = _p99(busy) / _p99(quiet)
        print(f"p99 quiet {_p99(quiet) * 1e6:.0f} us of {len(quiet)}, busy {_p99(busy) * 1e6:.0f} of {len(busy)}: {ratio:.2f}")
        return ratio


def _shrink(place: Place, size: str) -> None:
    with suppress(BlockingIOError):  # less was there than asked for
        place.write("shrink", size)


def _loads(image: int, offsets: range, is_over: Callable[[], bool], most: int) -> list[float]:
    """Seconds that loads of pages in no order take."""
    chance, into, found = Random(1), mmap.mmap(-1, PAGE_BYTES), list[float]()
    while len(found) < most and not is_over():
        offset = chance.choice(offsets)
        began = time.perf_counter()
        os.preadv(image, [into], offset)
        found.append(time.perf_counter() - began)
    return found


def _p99(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) * 99 // 100]
