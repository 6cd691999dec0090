"""A hog swaps on, and every byte of it is right, while everything in the daemon but the page path fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.mounted import TMEMFS, Place, swap_up, tmemfs
from tests.system.test_swap import hog, limited, meanwhile
from tests.waiting import HANG_S, wait_until
from tmemfs.system import swapdev
from tools.cgroup import MemoryCgroup

pytestmark = pytest.mark.system


@contextmanager
def failing_swap(directory: Path) -> Iterator[Place]:
    """A swap on a daemon whose jobs all fail."""
    place = Place(directory)
    place.mountpoint.mkdir()
    command = [sys.executable, "-m", "tests.failing_daemon", str(directory), "2G", "64M", str(place.log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            device = swapdev.attach(place.image)
            swapdev.make_swap(device)
            swapdev.swap_on(device, 100)
            yield place
            assert process.poll() is None
        finally:
            for device in swapdev.loop_devices_of(place.image):
                with suppress(Exception):
                    swapdev.swap_off(device)
                    swapdev.detach(device)
            deadline = time.monotonic() + HANG_S / 4
            while process.poll() is None and time.monotonic() < deadline:
                with suppress(OSError):
                    swapdev.unmount(place.mountpoint)
                time.sleep(0.1)
            process.kill()
            with suppress(OSError):
                swapdev.unmount(place.mountpoint, lazy=True)


def is_refused(place: Place, name: str) -> bool:
    return f"{name}: not stopping" in place.log.read_text()


def threads_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def test_no_failure_beside_the_page_path_costs_a_byte(tmp_path: Path) -> None:
    with failing_swap(tmp_path) as place, limited("failing", "64M") as cgroup:
        pid = int(read_patiently(place, "stat").split("daemon_pid ")[1].split()[0])
        threads, asked = threads_of(pid), [0]

        def disturb() -> None:  # each of these may be cut short by a failing job; none may end the daemon
            for name, value in (
                ("shrink", "4M"),
                ("compact", "1.05"),
                ("recompress", "zstd"),
                ("pool.max", "48M"),
                ("pool.max", "64M"),
            ):
                with suppress(OSError):
                    place.write(name, value)
                    asked[0] += 1
            os.kill(pid, signal.SIGTERM)
            assert threads_of(pid) <= threads

        with meanwhile(disturb, 0.2):
            answer = hog(cgroup, "192M", rounds=1)
        assert answer["wrong"] == 0 and asked[0] > 0
        events = read_patiently(place, "events")
        assert int(events.split("job_failures ")[1].split()[0]) > 10
        state = read_patiently(place, "state")
        assert "degraded" in state and "injected into" in state, state
    log = place.log.read_text()
    for job in ("cleaner", "shrinker", "recompressor", "pressure", "signals", "namespace"):
        assert f"job {job} failed" in log and f"Injected: injected into {job}" in log, job
    assert log.count("the event loop failed and is started again") == 2
    assert "SIGTERM: not stopping" in log and "has ended: it was unmounted" in log


def read_patiently(place: Place, name: str) -> str:
    """A control file, though the job that serves it fails now and then."""
    deadline = time.monotonic() + HANG_S
    while True:
        try:
            return place.read(name)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def _is_emptied(cgroup: Path, outside: Path) -> bool:
    """Move the processes of `cgroup` to `outside`; whether there were none left."""
    found = (cgroup / "cgroup.procs").read_text().split()
    for pid in found:
        with suppress(OSError):
            (outside / "cgroup.procs").write_text(pid)
    return not found


def test_a_cgroup_that_is_removed_takes_its_signals_and_not_the_daemon(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.mountpoint.mkdir()
    try:
        with MemoryCgroup("removed", 1 << 30) as removed:
            outside = memory_cgroup_of(os.getpid())
            inside = f'echo $$ > {removed.tasks}; exec "$@"'
            command = [*TMEMFS, "up", *map(str, place.options), "--size", "1G", "--pool-max", "64M"]
            subprocess.run(["sh", "-c", inside, "sh", *command], check=True, timeout=HANG_S, stdout=subprocess.DEVNULL)
            assert "limit of cgroup" in place.read("state")
            wait_until(lambda: _is_emptied(removed.path, outside))  # of supervisor, worker and spare
        with limited("after", "64M") as cgroup:
            hog(cgroup, "160M", rounds=1)
        wait_until(lambda: "limit of cgroup" not in place.read("state"))
        assert place.state == "running" and "cannot be read any more" in place.log.read_text()
    finally:
        place.end()


def memory_cgroup_of(pid: int) -> Path:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory") / path.strip("/")
    return Path("/sys/fs/cgroup")


def test_no_thread_is_created_once_the_mount_answers(tmp_path: Path) -> None:
    with swap_up(tmp_path, pool_max="64M", size="1G") as place, limited("threads", "64M") as cgroup:
        threads = threads_of(place.pid)
        hog(cgroup, "160M", rounds=1)
        for name, value in (("shrink", "8M"), ("compact", "1.05"), ("recompress", "zstd"), ("pool.max", "48M")):
            with suppress(BlockingIOError):
                place.write(name, value)
        os.kill(place.pid, signal.SIGTERM)
        wait_until(lambda: "SIGTERM: not stopping" in place.log.read_text())
        assert threads_of(place.pid) == threads


def test_only_sigkill_ends_a_daemon_whose_swap_is_on(tmp_path: Path) -> None:
    with swap_up(tmp_path, size="1G") as place:
        pid = place.pid
        for number in sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}):
            os.kill(pid, number)
        for name in ("SIGTERM", "SIGINT", "SIGQUIT"):
            wait_until(partial(is_refused, place, name))
        assert place.state == "running" and place.pid == pid
        tmemfs("down", place.mountpoint)
        assert place.log.read_text().rstrip().endswith("has ended: it was unmounted")
