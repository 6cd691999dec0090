"""A swap that no worker serves any more: the mount answers errors, and the command says so and cleans up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mounted import Place, tmemfs
from tests.paged_out import FIRST, paged_out, swapped_bytes
from tests.waiting import HANG_S, wait_until
from tmemfs.cli import health
from tmemfs.system import runtime, swapdev
from tmemfs.units import MIB

pytestmark = pytest.mark.system


def health_of(place: Place) -> health.Health:
    found = health.look(place.mountpoint)
    assert found is not None
    return found


@contextmanager
def up(directory: Path) -> Iterator[Place]:
    """An active swap. Only its first worker serves."""
    place = Place(directory)
    place.mountpoint.mkdir()
    command = ("up", *map(str, place.options), "--size", "256M", "--pool-max", "64M", *FIRST)
    try:
        subprocess.run([sys.executable, "-m", "tests.dying_daemon", *command], check=True, timeout=HANG_S, capture_output=True)
        yield place
    finally:
        place.end()


def give_up(place: Place) -> None:
    """Kill the first worker, and wait until the others have died."""
    worker = health_of(place).status.worker
    assert worker
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: health_of(place).has_given_up)


def test_stat_and_the_doctor_say_that_no_worker_is_started_any_more(tmp_path: Path) -> None:
    with up(tmp_path) as place:
        give_up(place)
        done = tmemfs("stat", place.mountpoint, check=False)
        said = " ".join(done.stdout.split())
        assert done.returncode == 1
        assert "none is started any more: the mount answers errors" in said and "6 (1 killed, 5 crashed)" in said
        said = tmemfs("doctor", check=False).stdout
        line = next(line for line in said.splitlines() if line.startswith(str(place.mountpoint)))
        assert " FAILS " in line and "the mount answers errors" in line


def test_down_cleans_up_where_nothing_is_swapped_out(tmp_path: Path) -> None:
    with up(tmp_path) as place:
        give_up(place)
        pid = health_of(place).status.supervisor
        assert "cleaned up after workers that had died" in tmemfs("down", place.mountpoint).stdout
        assert runtime.process_started(pid) is None and not swapdev.is_mounted(place.mountpoint)
        assert not swapdev.loop_devices_of(place.image)


def test_down_gives_pages_up_only_by_force(tmp_path: Path) -> None:
    with up(tmp_path) as place, paged_out(place):
        give_up(place)
        done = tmemfs("down", place.mountpoint, check=False)
        assert done.returncode == 2 and "are swapped out, and cannot be loaded" in done.stderr and "--force" in done.stderr
        assert swapped_bytes(place) > MIB
        assert "cleaned up after workers that had died" in tmemfs("down", place.mountpoint, "--force").stdout
        assert not swapdev.is_mounted(place.mountpoint)
