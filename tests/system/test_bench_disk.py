"""The limits of a slower disk, on a loop device: they hold, a limit that does not is noticed, and a kill leaves none for long."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tmemfs.system import swapdev
from tools.bench.disk import PROFILES, DiskLimits, Profile, Rates
from tools.bench.disk_watch import Check, DiskWatch
from tools.bench.settings import Settings

BLKIO = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")
SLOW = Profile("slow", Rates(write_bps=8e6))
WRITE_S = 3.0
#: A benchmark that limits a disk, and is killed.
KILLED = """
import os, signal, sys
from pathlib import Path
from tools.bench.disk import PROFILES, DiskLimits
from tools.bench.settings import Settings
with Settings(Path(sys.argv[1])) as settings:
    settings.change(DiskLimits(PROFILES["sd"], sys.argv[2]).changes())
    os.kill(os.getpid(), signal.SIGKILL)
"""

pytestmark = [pytest.mark.system, pytest.mark.skipif(not BLKIO.exists(), reason="no block I/O controller of cgroup v1")]


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """A loop device."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    found = swapdev.attach(image)
    yield found
    swapdev.detach(found)


def number_of(device: str) -> str:
    found = os.stat(device).st_rdev
    return f"{os.major(found)}:{os.minor(found)}"


def limits_of(number: str) -> list[str]:
    """The lines of a device in the files of the controller."""
    texts = [file.read_text() for file in BLKIO.parent.glob("blkio.throttle.*_device")]
    return [line for text in texts for line in text.splitlines() if line.startswith(f"{number} ")]


def write(device: str) -> None:
    """Write as fast as the device takes it."""
    until, megabyte = time.monotonic() + WRITE_S, mmap.mmap(-1, 1 << 20)
    fd = os.open(device, os.O_WRONLY | os.O_DIRECT)
    try:
        while time.monotonic() < until:
            os.pwrite(fd, megabyte, 0)
    finally:
        os.close(fd)


def checked(limits: DiskLimits, device: str) -> Check:
    with DiskWatch(limits) as watch:
        write(device)
    return Check.of(0, "plain", "test", watch.samples, SLOW.limits)


def test_a_limit_holds_for_the_block(device: str, tmp_path: Path) -> None:
    limits = DiskLimits(SLOW, number_of(device))
    with Settings(tmp_path / "record") as settings:
        settings.change(limits.changes())
        assert limits_of(limits.disk) == [f"{limits.disk} 8000000"]
        check = checked(limits, device)
    assert check.excess == "" and check.written_bytes > 0
    assert limits_of(limits.disk) == []


def test_a_limit_that_is_not_there_is_noticed(device: str) -> None:
    assert "write_bps" in checked(DiskLimits(SLOW, number_of(device)), device).excess


def test_what_a_benchmark_that_was_killed_has_limited_is_not_limited_after_the_next(device: str, tmp_path: Path) -> None:
    number, record = number_of(device), tmp_path / "record"
    killed = subprocess.run([sys.executable, "-c", KILLED, record, number], check=False, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    assert len(limits_of(number)) == len(DiskLimits(PROFILES["sd"], number).changes()) == 3
    with Settings(record):
        assert limits_of(number) == []
