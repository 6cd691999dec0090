"""A real mount keeps idle CPUs awake while requests come, and not while it is idle. So does the worker that replaces a dead one."""

from __future__ import annotations

import mmap
import os
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.mounted import Place, mounted, tmemfs, wait_until
from tmemfs.errors import Refused
from tmemfs.system.cpu_latency import DEVICE, check_device
from tmemfs.units import PAGE_BYTES

#: The kernel's default, as it shows it while nobody asks for less.
NO_LIMIT = 2_000_000_000


def limit_us() -> int:
    """What the kernel applies now."""
    with open(DEVICE, "rb", buffering=0) as device:
        return int(struct.unpack("=i", device.read(4))[0])


@pytest.fixture(autouse=True)
def device() -> None:
    """Skip where the kernel is not to be asked, or another program asks, too."""
    try:
        check_device()
        limit = limit_us()
    except (Refused, OSError) as error:
        pytest.skip(f"needs {DEVICE}: {error}")
    if limit == 0:
        pytest.skip("another program keeps CPUs awake")


@contextmanager
def requests(place: Place) -> Iterator[Callable[[], None]]:
    """Reads a hundred pages of the image, each by a request of its own."""
    fd = os.open(place.image, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, PAGE_BYTES) as page:

            def read() -> None:
                for slot in range(100):
                    assert os.preadv(fd, [page], slot * PAGE_BYTES) == PAGE_BYTES

            yield read
    finally:
        os.close(fd)


def held(read: Callable[[], None]) -> bool:
    """Whether CPUs are kept awake after another hundred reads."""
    read()
    return limit_us() == 0


def test_cpus_are_kept_awake_while_requests_come_and_not_while_none_do(tmp_path: Path) -> None:
    with mounted(tmp_path) as place, requests(place) as read:
        assert place.read("latency") == "[auto] off always" and limit_us() != 0 and place.number("latency_bursts") == 0
        for _ in range(2):
            wait_until(lambda: held(read))
            wait_until(lambda: limit_us() != 0)
            wait_until(lambda: place.flat()["latency_held"] == "0")
        stat = place.flat()
        assert int(stat["latency_bursts"]) >= 2 and int(stat["latency_held_ms"]) >= 10
        # nothing goes on in the background
        assert place.number("latency_bursts") == int(stat["latency_bursts"])


def test_off_never_does_and_always_needs_no_request(tmp_path: Path) -> None:
    with mounted(tmp_path, "--latency", "off") as place, requests(place) as read:
        for _ in range(20):
            read()
            assert limit_us() != 0
        assert place.number("latency_bursts") == 0
        place.write("latency", "always")
        assert limit_us() == 0 and place.flat()["latency_held"] == "1"
        done = tmemfs("up", *place.options, "--latency", "off", check=False)
        assert done.returncode == 2 and "--latency off was given, and it is always" in done.stderr
        place.write("latency", "off")
        assert limit_us() != 0
    assert limit_us() == NO_LIMIT


def test_it_ends_with_a_killed_worker_and_the_next_one_takes_it_up(tmp_path: Path) -> None:
    with mounted(tmp_path, "--latency", "always") as place:
        for _ in range(2):
            worker = place.number("worker_pid")
            assert limit_us() == 0
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda worker=worker: place.number("worker_pid") != worker)  # type: ignore[misc]
            wait_until(lambda: limit_us() == 0)
        place.write("latency", "auto")
        assert limit_us() != 0
        with requests(place) as read:
            wait_until(lambda: held(read))
            with suppress(ProcessLookupError):
                os.kill(place.number("worker_pid"), signal.SIGKILL)
            wait_until(lambda: limit_us() != 0)
            wait_until(lambda: held(read))
