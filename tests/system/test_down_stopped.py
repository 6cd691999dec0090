"""`down` while the worker is stopped: it says what it waits for, and ends once another worker answers."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.mounted import TMEMFS, swap_up, tmemfs
from tests.paged_out import FIRST, paged_out
from tests.waiting import HANG_S, wait_until
from tmemfs.cli import health
from tmemfs.system import swapdev

pytestmark = pytest.mark.system


def stop(mountpoint: Path) -> int:
    found = health.look(mountpoint)
    assert found is not None and found.status.worker
    os.kill(found.status.worker, signal.SIGSTOP)

    def is_stopped() -> bool:
        now = health.look(mountpoint)
        return now is not None and now.is_stopped

    wait_until(is_stopped)
    return found.status.worker


def test_down_says_what_it_waits_for_and_goes_on(tmp_path: Path) -> None:
    # something to swap in, for which a worker is needed: swapoff of an empty swap asks for nothing
    with swap_up(tmp_path, "--watchdog", "off", *FIRST) as place, paged_out(place):
        worker = stop(place.mountpoint)
        with subprocess.Popen([*TMEMFS, "down", str(place.mountpoint)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as down:
            assert down.stderr is not None and down.stdout is not None
            line = down.stderr.readline().decode()
            assert line.startswith(f"tmemfs: worker {worker} (generation 1) has not answered for ") and "waiting for it" in line
            assert down.poll() is None
            os.kill(worker, signal.SIGCONT)
            assert down.wait(HANG_S) == 0
        assert not swapdev.is_mounted(place.mountpoint)


def test_down_by_force_has_a_stopped_worker_replaced(tmp_path: Path) -> None:
    with swap_up(tmp_path, "--watchdog", "off", *FIRST) as place, paged_out(place):
        stop(place.mountpoint)
        assert "down" in tmemfs("down", "--force", place.mountpoint).stdout
        assert not swapdev.is_mounted(place.mountpoint)
