"""A daemon that something happens to before its mount answers: it says why it ends, and leaves no mount behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounted import wait_until
from tmemfs.system import runtime, swapdev

pytestmark = pytest.mark.fuse

_PROGRAM = """
import os, signal, sys, threading
from pathlib import Path
import pyfuse3
from tmemfs import supervisor, worker
from tmemfs.errors import TmemfsError
from tmemfs.options import Options

class Injected(Exception):
    pass

def fail(*_, **__):
    raise Injected("injected")

def ready():
    print("ready", flush=True)

{injected}
try:
    supervisor.serve(Options(Path(sys.argv[1]), 64 << 20, "16M"), ready)
    print("ended")
except TmemfsError as error:
    print("refused:", error)
except Exception as error:
    print("failed:", repr(error))
"""


def start(mountpoint: Path, injected: str) -> subprocess.Popen[str]:
    """A daemon that does `injected` first."""
    mountpoint.mkdir(exist_ok=True)
    program = [sys.executable, "-c", _PROGRAM.format(injected=injected), str(mountpoint)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def said(mountpoint: Path, injected: str) -> str:
    """What a daemon said at its end; nothing is mounted then."""
    daemon = start(mountpoint, injected)
    try:
        text = daemon.communicate(timeout=60)[0]
    finally:
        daemon.kill()
        is_mounted = swapdev.is_mounted(mountpoint)
        if is_mounted:
            swapdev.unmount(mountpoint, lazy=True)
    assert not is_mounted, text
    return text


@pytest.mark.parametrize("allowed", [0, 1, 10])
def test_a_daemon_that_cannot_have_its_threads_says_so(tmp_path: Path, allowed: int) -> None:
    injected = f"""
start, left = threading.Thread.start, [{allowed}]
def limited(self):
    if not left[0]:
        raise RuntimeError("can't start new thread")
    left[0] -= 1
    start(self)
threading.Thread.start = limited
"""
    assert "refused: not enough threads can be created" in said(tmp_path / "mnt", injected)


@pytest.mark.parametrize(
    "what", ["worker.Relay", "pyfuse3.init", "worker.Pager.warm", "worker.log_in_background", "worker.trio.run"]
)
def test_a_failure_before_the_mount_answers_leaves_no_mount(tmp_path: Path, what: str) -> None:
    assert "refused: bug in tmemfs (Injected('injected'))" in said(tmp_path / "mnt", f"{what} = fail")


@pytest.mark.parametrize("attempt", range(2))
def test_a_signal_before_the_mount_answers_ends_the_daemon(tmp_path: Path, attempt: int) -> None:
    injected = """
warm = worker.Pager.warm
def told(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    warm(*arguments)
worker.Pager.warm = told
"""
    text = said(tmp_path / "mnt", injected)
    assert "Traceback" not in text and "failed" not in text


def test_a_daemon_stays_when_nobody_waits_for_its_readiness_any_more(tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    daemon = start(mountpoint, "def ready():\n    print('there', flush=True)\n    raise BrokenPipeError(32, 'gone')")
    try:
        wait_until(lambda: daemon.poll() is not None or (mountpoint / "control/state").exists())
        assert daemon.poll() is None
        assert (mountpoint / "control/state").read_text().startswith("running\n")
        swapdev.unmount(mountpoint)
        assert "ended\n" in daemon.communicate(timeout=60)[0]
    finally:
        daemon.kill()
        if swapdev.is_mounted(mountpoint):
            swapdev.unmount(mountpoint, lazy=True)


def test_a_daemon_that_ends_late_leaves_alone_what_is_mounted_there_by_then(tmp_path: Path) -> None:
    mountpoint, go_on = tmp_path / "mnt", tmp_path / "go-on"
    injected = f"""
import time
from tmemfs.jobs.shrinker import Shrinker
def wait(self):
    while not Path({str(go_on)!r}).exists():
        time.sleep(0.01)
Shrinker._fill_reserve = wait  # a job that cannot be cancelled
"""
    daemon = start(mountpoint, injected)
    try:
        wait_until((mountpoint / "control").exists)
        swapdev.unmount(mountpoint)
        subprocess.run(["mount", "-t", "tmpfs", "next", mountpoint], check=True)
        go_on.touch()
        assert "ended\n" in daemon.communicate(timeout=60)[0]
        assert swapdev.is_mounted(mountpoint)
    finally:
        daemon.kill()
        if swapdev.is_mounted(mountpoint):
            swapdev.unmount(mountpoint, lazy=True)


def test_a_mount_that_is_gone_before_it_answers_is_named(tmp_path: Path) -> None:
    injected = """
from tmemfs.system.swapdev import unmount
run = worker.trio.run
def late(*arguments):
    unmount(Path(sys.argv[1]))
    return run(*arguments)
worker.trio.run = late
"""
    text = said(tmp_path / "mnt", injected)
    assert "ended\n" in text or "was it unmounted meanwhile?" in text


@pytest.mark.parametrize("spare", [2, 5, 8])
def test_a_daemon_that_cannot_open_enough_files_says_so(tmp_path: Path, spare: int) -> None:
    injected = f"""
import resource
supervisor.raise_limits = lambda: None  # which would have refused it before anything is opened
lowest = os.open("/dev/null", os.O_RDONLY)
os.close(lowest)
resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + {spare},) * 2)
"""
    text = said(tmp_path / "mnt", injected)
    assert "refused:" in text and "not enough files can be opened" in text
    assert not runtime.status_path(tmp_path / "mnt").exists()
