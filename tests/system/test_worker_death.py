"""Workers die while a machine swaps: no byte is lost, and the next worker goes on. The supervisor's death is a crash."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.mounted import Place, swap_up, tmemfs
from tests.system.test_swap import HOG, LONG_S, limited, shrink_now
from tests.waiting import HANG_S, wait_until
from tmemfs.system import swapdev
from tmemfs.units import MIB, PAGE_BYTES
from tools.cgroup import MemoryCgroup
from tools.kills.machine_checks import KernelLog, kernel_faults, names_of
from tools.kills.prober import Prober, Reads
from tools.kills.strikes import kill, kill_twice
from tools.kills.worker import worker_of

pytestmark = pytest.mark.system

SWAP = "1G"
NEVER = ("corrupt_records", "read_errors", "write_errors", "stores_refused")


@contextmanager
def churning_hog(cgroup: MemoryCgroup, size: str) -> Iterator[subprocess.Popen[str]]:
    """A hog that verifies its pages round after round, until its input ends."""
    command = [*HOG, "--size", size, "--churn", "0.2", "--tasks", str(cgroup.tasks)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def last_round(process: subprocess.Popen[str]) -> list[dict[str, int]]:
    """Have the hog verify everything once more and end; all rounds that it did."""
    said, _ = process.communicate(timeout=LONG_S)
    assert process.returncode == 0, (process.returncode, said)
    return [json.loads(line) for line in said.splitlines()]


@contextmanager
def probed(place: Place) -> Iterator[Prober]:
    """A prober that loads random pages of the image, for the time of the block."""
    with ExitStack() as stack:
        pages = Reads(place.image, range(1024 * MIB // PAGE_BYTES), seed=1)
        stack.callback(pages.close)
        yield stack.enter_context(Prober("swap", pages.request))


@contextmanager
def no_fault_in_the_kernels_log(device: str) -> Iterator[None]:
    """Nothing that the kernel logs during the block is an error of this device."""
    log = KernelLog()
    try:
        yield
        assert kernel_faults(log.lines(), names_of(device)) == []
    finally:
        log.close()


@contextmanager
def swapping(directory: Path) -> Iterator[tuple[Place, Prober]]:
    """A swap under a hog; at the end every byte was verified, and nothing is counted or logged that must not be."""
    with swap_up(directory, pool_max="32M", size=SWAP) as place, limited("deaths", "48M") as cgroup:
        [device] = swapdev.loop_devices_of(place.image)
        with no_fault_in_the_kernels_log(device), churning_hog(cgroup, "128M") as hog:
            wait_until(lambda: place.number("pages_written") > 1000)
            with probed(place) as prober:
                yield place, prober
            rounds = last_round(hog)
        assert rounds and sum(one["wrong"] for one in rounds) == 0
        events = place.flat("events")
        assert {key: events[key] for key in NEVER} == dict.fromkeys(NEVER, "0")
        wait_until(lambda: place.state == "running")
        tmemfs("down", place.mountpoint)


def has_moved(place: Place, key: str, before: int, by: int) -> bool:
    """Whether a counter has grown by that much, or counts from zero again."""
    now = place.number(key)
    return now < before or now >= before + by


def test_no_byte_is_lost_while_workers_die(tmp_path: Path) -> None:
    moments = random.Random(1)
    with swapping(tmp_path) as (place, prober):
        supervisor, workers = place.pid, set[int]()
        for _ in range(10):
            wait_until(partial(has_moved, place, "stores", place.number("stores"), moments.randrange(800)))
            workers.add(worker_of(supervisor, HANG_S))
            kill(supervisor, prober)
        assert place.pid == supervisor and len(workers) == 10


def test_no_byte_is_lost_while_workers_die_that_write_back(tmp_path: Path) -> None:
    with swapping(tmp_path) as (place, prober):
        for _ in range(6):
            written = place.number("pages_written")
            shrink_now(place, "4M")
            wait_until(partial(has_moved, place, "pages_written", written, 1))
            kill(place.pid, prober)


def test_a_worker_may_die_while_it_recovers(tmp_path: Path) -> None:
    moments = random.Random(2)
    with swapping(tmp_path) as (place, prober):
        strikes = [kill_twice(place.pid, prober, "recovering", moments) for _ in range(6)]
        assert sum(strike.deaths for strike in strikes) == 12


def test_down_cleans_up_after_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    setting = Path("/proc/sys/vm/watermark_boost_factor")
    before = setting.read_text()
    with swap_up(tmp_path, size=SWAP) as place:
        worker = os.pidfd_open(worker_of(place.pid, HANG_S))
        os.kill(place.pid, signal.SIGKILL)
        # it would serve with nobody to replace it, and nobody to undo what the supervisor changed
        assert select.select([worker], [], [], HANG_S)[0], "the worker outlives its supervisor"
        os.close(worker)
        wait_until(lambda: swapdev.mount_is_dead(place.mountpoint))
        done = tmemfs("stat", place.mountpoint, check=False)
        assert done.returncode == 2 and "has gone: run 'tmemfs down" in done.stderr
        assert "cleaned up" in tmemfs("down", place.mountpoint).stdout
        assert setting.read_text() == before
        assert not swapdev.is_mounted(place.mountpoint) and not swapdev.loop_devices_of(place.image)
        assert "up" in tmemfs("up", *place.options).stdout
