"""The pool gives memory back at the speed of those who want it: daemon and hog in one cgroup, whose limit both have to share."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from tests.mounted import TMEMFS, Place, mounted
from tests.waiting import HANG_S, wait_until
from tmemfs.system.swapdev import mount_is_dead
from tmemfs.units import MIB, parse_size
from tools.cgroup import MemoryCgroup, memory_controller
from tools.warm import use_memory

pytestmark = pytest.mark.system

GROW = (sys.executable, str(Path(__file__).parents[2] / "tools" / "grow.py"))
#: Supervisor and spare live in the cgroup, too; the hog and the pool share what is left by them.
BESIDE = 64 * MIB
LIMIT = 512 * MIB + BESIDE
POOL = 250 * MIB
#: The hog grows to 90% of the limit; it may be faster than 500 MB/s, and is throttled to somewhat more.
HOG = (LIMIT - BESIDE) * 9 // 10
RATE = "700M"
#: Of the rate that it reaches where no pool is in its way, and of the time that it takes.
LEAST_RATE_SHARE = 5 / 7
LONGEST_RELEASE_SHARE = 0.3
#: A busy machine may take the processor from either side in any one round.
ROUNDS = 10


@contextmanager
def shared_cgroup(directory: Path, limit: int = LIMIT) -> Iterator[tuple[Place, MemoryCgroup]]:
    """A mount whose daemon lives in a cgroup of `limit`."""
    if memory_controller() != "v1":
        pytest.skip("needs a memory controller of version 1: its thresholds tell when a limit comes near")
    place = Place(directory)
    place.mountpoint.mkdir()
    with MemoryCgroup("shared", limit) as cgroup:
        try:
            inside = f'echo $$ > {cgroup.tasks}; exec "$@"'
            command = [*TMEMFS, "mount", *map(str, place.options), "--size", "2G", "--pool-max", "90%"]
            subprocess.run(["sh", "-c", inside, "sh", *command], check=True, timeout=HANG_S)
            yield place, cgroup
        finally:
            place.end()


def fill(place: Place, size: int, pause_s: float = 0) -> bytes:
    """Write pages that do not compress; a MiB of them, which is repeated."""
    data = Random(1).randbytes(MIB)
    fd = os.open(place.image, os.O_RDWR)
    try:
        for offset in range(0, size, MIB):
            os.pwrite(fd, data, offset)
            time.sleep(pause_s)
    finally:
        os.close(fd)
    return data


def grow(cgroup: MemoryCgroup) -> subprocess.CompletedProcess[str]:
    command = [*GROW, "--size", str(HOG), "--rate", RATE, "--tasks", str(cgroup.tasks)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)


@contextmanager
def holding(cgroup: MemoryCgroup, size: int) -> Iterator[None]:
    """A program that has locked `size` bytes, for as long as it takes."""
    command = [*GROW, "--size", str(size), "--rate", RATE, "--tasks", str(cgroup.tasks), "--hold", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            yield
        finally:
            process.kill()


def test_a_hog_grows_to_nine_tenths_of_a_limit_that_the_pool_has_half_of(tmp_path: Path) -> None:
    """In each round it is not killed and nothing is lost; in one of them it is not held up either."""
    use_memory(4 * LIMIT)
    rounds = list[tuple[float, float, float]]()
    for number in range(ROUNDS):
        with MemoryCgroup("alone", LIMIT) as cgroup:
            alone = float(grow(cgroup).stdout)
        directory = tmp_path / str(number)
        directory.mkdir()
        rate, first_release_s = _grow_beside_a_pool(directory)
        rounds.append((alone, rate, first_release_s))
        print(f"alone {alone:.0f} MB per s, beside the pool {rate:.0f}, first frame released after {1000 * first_release_s:.0f} ms")
        if (
            rate >= LEAST_RATE_SHARE * min(alone, parse_size(RATE) / 1e6)
            and 0 < first_release_s < LONGEST_RELEASE_SHARE * HOG / 1e6 / rate
        ):
            return
    pytest.fail(f"the hog was held up in every round: {rounds}")


def _grow_beside_a_pool(directory: Path) -> tuple[float, float]:
    """The rate that the hog reached, in MB per second, and the time from the first sign of pressure to the first frame released."""
    with shared_cgroup(directory) as (place, cgroup):
        assert f"limit of cgroup v1 {cgroup.path.name}" in place.read("state")
        data = fill(place, POOL)
        assert place.number("pool_current") >= POOL
        done = grow(cgroup)
        assert done.returncode == 0, (done, place.flat())
        stat = place.flat()
        assert int(stat["pool_current"]) < LIMIT - HOG
        assert place.flat("events")["stores_refused"] == "0" and place.state == "running"
        fd = os.open(place.image, os.O_RDONLY)
        try:
            for offset in range(0, POOL, 16 * MIB):
                assert os.pread(fd, MIB, offset) == data
        finally:
            os.close(fd)
        return float(done.stdout), int(stat["pressure_first_release_us"]) / 1e6


@pytest.mark.parametrize("mode", ["off", "manual"])
def test_without_the_law_the_same_hog_is_killed(tmp_path: Path, mode: str) -> None:
    with shared_cgroup(tmp_path) as (place, cgroup):
        place.write("pressure.mode", mode)
        fill(place, POOL)
        done = grow(cgroup)
        assert done.returncode == -9 or mount_is_dead(place.mountpoint)  # one of the two


def test_under_steady_moderate_pressure_the_pool_keeps_its_size_and_grows_back_after(tmp_path: Path) -> None:
    """The hog leaves one to two reserves of headroom, and pages are stored over and over; then it ends."""
    with shared_cgroup(tmp_path) as (place, cgroup):
        seen = list[list[int]]()
        fill(place, POOL)
        with holding(cgroup, place.number("pressure_headroom") - int(place.read("pressure.reserve")) * 3 // 2):
            while place.flat()["pressure_state"] != "holding":  # it may have given up more than the hog took, and grows again
                fill(place, POOL)
            sizes = [0, place.number("pool_current")]
            while max(sizes) - min(sizes) >= max(sizes) // 10:  # until it has settled
                fill(place, POOL)
                sizes.clear()
                for _ in range(4):
                    fill(place, POOL // 4, pause_s=0.02)
                    sizes.append(place.number("pool_current"))
                seen.append(sizes.copy())
                assert len(seen) < ROUNDS, (seen, place.flat())
        place.write("pressure.growth", "1T")
        wait_until(lambda: place.flat()["pressure_ceiling"] == "max")
        fill(place, LIMIT // 2 + 32 * MIB)
        assert place.number("pool_current") > max(sizes), (sizes, place.flat())


def test_somebody_else_s_stall_is_noticed_though_no_page_is_stored(tmp_path: Path) -> None:
    """A program that keeps meeting the limit of its own cgroup stalls for memory; the daemon's is another."""
    with mounted(tmp_path) as place, MemoryCgroup("stalled", 24 * MIB) as cgroup:
        if "stalls" not in place.read("state"):
            pytest.skip("needs stalls that are told (PSI)")
        wait_until(lambda: not _looks_in(place, 1.5))
        write = f"echo $$ > {cgroup.tasks}; exec dd if=/dev/zero of={tmp_path}/file bs=1M count=4000 conv=notrunc oflag=sync"
        with subprocess.Popen(["sh", "-c", write], stderr=subprocess.DEVNULL) as process:
            try:
                wait_until(lambda: _looks_in(place, 0.5) > 0)
            finally:
                process.kill()


def _looks_in(place: Place, seconds: float) -> int:
    before = place.number("pressure_samples")
    time.sleep(seconds)
    return place.number("pressure_samples") - before
