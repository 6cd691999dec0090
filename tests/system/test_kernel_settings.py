"""Settings of this machine's kernel are the administrator's again, also where a daemon was killed while they were changed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.mounted import Place, mounted, swap_up, tmemfs, wait_until
from tests.waiting import readable
from tmemfs.system import swapdev
from tmemfs.system.kernel_settings import BOOST, MINIMUM, KernelSettings

pytestmark = pytest.mark.system

SMALL: Final = {"size": "64M", "pool_max": "32M"}
VM: Final = Path("/proc/sys/vm")
#: Lowers and raises all that it can, as a daemon does in a swap stall, says so, and waits for its end.
CHANGER: Final = """
import sys
from tmemfs.system.kernel_settings import KernelSettings
user = KernelSettings()
user.register()
user.give_priority()
print(user.lower_minimum(1 / 2), flush=True)
sys.stdin.read()
"""

Values = tuple[int, int, frozenset[int]]


def values() -> Values:
    """The minimum, the factor, and the kernel's workers with our priority."""
    minimum, factor = (int((VM / name).read_text().split()[0]) for name in (MINIMUM, BOOST))
    with closing(KernelSettings()) as settings:
        return minimum, factor, settings._workers.with_priority()


@pytest.fixture
def before() -> Iterator[Values]:
    """The administrator's values; the factor is not 0, so that a change is seen."""
    with closing(KernelSettings()) as settings:
        settings.restore_leftovers()
    factor = (VM / BOOST).read_text()
    (VM / BOOST).write_text("14000")
    yield values()
    (VM / BOOST).write_text(factor)


@contextmanager
def changer() -> Iterator[subprocess.Popen[str]]:
    """A process that has changed everything; killed at the end."""
    with subprocess.Popen([sys.executable, "-c", CHANGER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "True\n"
            yield process
        finally:
            process.kill()


def kill(place: Place) -> None:
    """SIGKILL to the daemon; returns when it has gone."""
    pid = place.pid
    ended = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    readable(ended)
    os.close(ended)


def test_settings_are_as_before_after_two_daemons_were_killed(tmp_path: Path, before: Values) -> None:
    minimum, factor, workers = before
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    with (
        swap_up(tmp_path / "one", **SMALL) as one,
        swap_up(tmp_path / "other", **SMALL) as other,
    ):
        wait_until(lambda: one.number("watermark_boost_off") and other.number("watermark_boost_off"))
        assert values() == (minimum, 0, workers)
        assert other.number(f"{BOOST}_administrators") == factor and other.number(f"{MINIMUM}_administrators") == minimum
        with changer():
            assert values()[0] == -(-minimum // 2) and values()[2] > workers
            assert f"vm.{BOOST} 0 (yours: {factor})" in tmemfs("doctor", check=False).stdout
            kill(one)
        tmemfs("down", one.mountpoint)
        assert values() == (minimum, 0, workers)
        with changer():
            kill(other)
        assert values()[0] == -(-minimum // 2)
        assert "left by a daemon that was killed" in tmemfs("doctor", check=False).stdout
        tmemfs("down", other.mountpoint)
        assert values() == before
        assert "none is changed" in tmemfs("doctor", check=False).stdout


def test_the_next_start_restores_what_a_killed_daemon_left(tmp_path: Path, before: Values) -> None:
    for name in ("killed", "following"):
        (tmp_path / name).mkdir()
    with swap_up(tmp_path / "killed", **SMALL) as killed:
        wait_until(lambda: killed.number("watermark_boost_off"))
        with changer():
            kill(killed)
        assert values()[:2] == (-(-before[0] // 2), 0)
        with mounted(tmp_path / "following"):
            wait_until(lambda: values() == before)


def test_settings_follow_the_swap_and_what_is_asked_for(tmp_path: Path, before: Values) -> None:
    minimum, factor, workers = before
    with swap_up(tmp_path, "--kernel-tuning", "off", **SMALL) as place:
        assert place.read("kernel.tuning") == "auto [off]" and values() == before
        place.write("kernel.tuning", "auto")
        assert values() == (minimum, 0, workers) and place.number("kernel_tuning_in_use") == 1
        place.write("kernel.tuning", "off")
        assert values() == before and place.flat()[BOOST] == "-"
        place.write("kernel.tuning", "auto")
        (VM / BOOST).write_text("13000")
        place.write("kernel.tuning", "off")
        assert values()[1] == 13000
        (VM / BOOST).write_text(str(factor))
        place.write("kernel.tuning", "auto")
        assert f"kernel:      vm.{BOOST} 0 (yours: {factor})" in tmemfs("stat", place.mountpoint).stdout.splitlines()
        (device,) = swapdev.loop_devices_of(place.image)
        swapdev.swap_off(device)
        wait_until(lambda: values() == before)
        swapdev.swap_on(device, 100)
        wait_until(lambda: values() == (minimum, 0, workers))
        tmemfs("down", place.mountpoint)
        assert values() == before
