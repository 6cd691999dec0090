"""What the command says and does while no worker answers: it is stopped, it is being replaced, or none is started any more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.mounted import Place, directory_for_all, mounted, tmemfs, wait_until
from tests.waiting import HANG_S
from tmemfs.cli import health
from tmemfs.system import runtime, swapdev
from tmemfs.system.status_region import Status, Word, read_status

pytestmark = pytest.mark.fuse

#: With the watchdog off, a command that waited for a stopped worker would wait until the test's limit.
OFF = ("--watchdog", "off")


def status(place: Place) -> Status:
    found = read_status(runtime.status_path(place.mountpoint))
    assert found is not None
    return found


def worker_of(place: Place) -> int:
    """The process of the worker that serves now."""
    wait_until(lambda: status(place).worker and status(place).words[Word.IS_SERVING])
    return status(place).worker


def fill(place: Place, size: int) -> None:
    with place.image.open("r+b") as image:
        image.write(os.urandom(size))


def replaced(place: Place, number: int) -> int:
    """Have the worker end by signal `number`, and wait until another one serves; the process that ended."""
    ended = worker_of(place)
    os.kill(ended, number)
    wait_until(lambda: status(place).worker not in (0, ended) and status(place).words[Word.IS_SERVING])
    return ended


def table(text: str) -> dict[str, str]:
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


@contextmanager
def stopped(place: Place) -> Iterator[int]:
    """The worker, which is stopped until the end of the block, if it lives that long."""
    worker = worker_of(place)
    os.kill(worker, signal.SIGSTOP)
    wait_until(lambda: health_of(place).is_stopped)
    try:
        yield worker
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGCONT)


def health_of(place: Place) -> health.Health:
    found = health.look(place.mountpoint)
    assert found is not None
    return found


def test_stat_says_that_the_worker_is_stopped_and_what_it_held(tmp_path: Path) -> None:
    with mounted(tmp_path, *OFF) as place:
        fill(place, 1 << 20)
        wait_until(lambda: status(place).words[Word.PAGES_STORED])
        with stopped(place) as worker:
            done = tmemfs("stat", place.mountpoint, check=False)
            said = table(done.stdout)
            assert done.returncode == 1
            assert said["state"].startswith(f"worker {worker} (generation 1) has not answered for ")
            assert "it is stopped; the watchdog is off: 'kill -9 " in " ".join(done.stdout.split())
            assert said["swapped out"] == "1 MiB" and said["figures"].endswith(" ago") and said["restarts"] == "none"
        assert "running" in tmemfs("stat", place.mountpoint).stdout


@pytest.mark.parametrize("form", [("--json",), ("--raw",), ("--output", "pool_max")])
def test_stat_for_programs_fails_while_the_worker_is_stopped(tmp_path: Path, form: tuple[str, ...]) -> None:
    with mounted(tmp_path, *OFF) as place, stopped(place):
        done = tmemfs("stat", *form, place.mountpoint, check=False)
        assert done.returncode == 2 and not done.stdout and "it is stopped" in done.stderr


def test_the_doctor_says_that_the_worker_is_stopped(tmp_path: Path) -> None:
    with mounted(tmp_path, *OFF) as place:
        line = next(line for line in tmemfs("doctor", check=False).stdout.splitlines() if line.startswith(str(place.mountpoint)))
        assert f"process {status(place).worker} serves for {place.pid} (generation 1)" in line
        with stopped(place):
            said = tmemfs("doctor", check=False).stdout
            line = next(line for line in said.splitlines() if line.startswith(str(place.mountpoint)))
            assert " limited " in line and "it is stopped" in line


def test_an_ordinary_user_is_told_that_the_mount_does_not_answer() -> None:
    with directory_for_all() as directory, mounted(directory, *OFF) as place:
        become_nobody = "import os, sys, tmemfs.cli, tmemfs.cli.health, tmemfs.cli.targets, tmemfs.cli.view; os.setuid(65534)"
        command = [sys.executable, "-c", f"{become_nobody}; sys.exit(tmemfs.cli.main(sys.argv[1:]))", "stat", str(place.mountpoint)]
        assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANG_S).stdout
        with stopped(place):
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG_S)
            assert done.returncode == 2 and "does not answer" in done.stderr and "run it as root" in done.stderr


def test_umount_ends_a_worker_that_is_stopped(tmp_path: Path) -> None:
    with mounted(tmp_path, *OFF) as place, stopped(place):
        pid = status(place).supervisor
        assert "unmounted" in tmemfs("umount", place.mountpoint).stdout
        assert runtime.process_started(pid) is None and not swapdev.is_mounted(place.mountpoint)


def test_up_refuses_a_mount_whose_worker_is_stopped(tmp_path: Path) -> None:
    with mounted(tmp_path, *OFF) as place, stopped(place):
        done = tmemfs("up", *place.options, check=False)
        assert done.returncode == 2 and "it is stopped" in done.stderr


def test_restarts_are_in_the_table_and_in_the_files(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        first = replaced(place, signal.SIGKILL)
        said = " ".join(tmemfs("stat", place.mountpoint).stdout.split())
        assert f"replaced 1 times (1 killed); process {status(place).worker} serves now" in said
        assert place.flat("events")["worker_deaths"] == "1" and place.flat()["worker_generation"] == "2"
        assert place.state == "running"  # a kill from outside is no fault of ours
        assert status(place).deaths[0].said == f"worker 1 (process {first}) was ended by SIGKILL"


def test_a_worker_that_crashes_degrades_the_state(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        replaced(place, signal.SIGSEGV)
        assert place.state.startswith("degraded: the worker was replaced once in the last minute: worker 1 (process ")


def test_the_watchdogs_time_is_an_option_and_can_be_written(tmp_path: Path) -> None:
    with mounted(tmp_path, "--watchdog", "1m") as place:
        assert place.read("watchdog") == "60" and status(place).watchdog_s == 60
        place.write("watchdog", "off")
        assert place.read("watchdog") == "off" and status(place).watchdog_s == 0
        place.write("watchdog", "2.5s")
        assert place.read("watchdog") == "2.5" and status(place).watchdog_s == 2.5
        done = tmemfs("up", *place.options, "--watchdog", "7", check=False)
        assert done.returncode == 2 and "--watchdog 7 was given, and it is 2.5" in done.stderr
        with stopped(place) as worker:
            # The request of this read waits until the watchdog acts: the worker goes on for a moment, to say where it was.
            assert place.read("watchdog") == "2.5"
            wait_until(lambda: status(place).worker not in (0, worker))
            assert [death.said.split(")")[1].split(" for")[0] for death in status(place).deaths] == [
                " was killed, as no request was answered"
            ]


SETTINGS = {
    "pool.max": "48M", "pool.high": "40M", "pool.low": "30M", "backing.max": "100M", "codec": "zstd:3", "recompress": "zstd:5",
    "clean.rate": "3M", "clean.daily": "5G", "pressure.mode": "manual", "pressure.reserve": "77M", "pressure.growth": "11M",
    "kernel.tuning": "off", "latency": "off", "watchdog": "40",
}  # fmt: skip


def test_what_users_have_set_survives_the_worker(tmp_path: Path) -> None:
    with mounted(tmp_path, pool_max="32M") as place:
        for name in ("pool.max", *reversed(SETTINGS)):  # pool.low before pool.high, and the maximum last
            with suppress(OSError):
                place.write(name, SETTINGS[name])
        place.write("pool.low", SETTINGS["pool.low"])
        for name in SETTINGS:
            with pytest.raises(OSError):
                place.write(name, "nonsense")
        before = {name: place.read(name) for name in SETTINGS}
        for number in (signal.SIGKILL, signal.SIGSEGV):
            replaced(place, number)
            assert {name: place.read(name) for name in SETTINGS} == before
        assert "cannot be that again" not in place.log.read_text()


def test_a_pool_that_was_made_larger_stays_so_with_what_it_holds(tmp_path: Path) -> None:
    with mounted(tmp_path, "--backing", "none", pool_max="32M") as place:
        place.write("pool.max", "128M")
        fill(place, 80 << 20)
        replaced(place, signal.SIGKILL)
        assert place.read("pool.max") == str(128 << 20) and place.number("pages_stored") == (80 << 20) // 4096


def test_the_oom_killer_prefers_the_worker(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        fill(place, 32 << 20)
        if place.flat()["oom_score_adj_set"] == "1":
            pytest.skip("both are exempt here")
        assert place.flat()["oom_worker_first"] == "1"
        for _ in range(2):
            scores = [int(Path(f"/proc/{pid}/oom_score").read_text()) for pid in (status(place).supervisor, worker_of(place))]
            assert scores[0] < scores[1]
            replaced(place, signal.SIGKILL)
