"""Signals in a process of its own: none ends it but SIGKILL, and those that are obeyed arrive in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import HANG_S
from tmemfs.system.posix_signals import LEAVE, REOPEN_LOG, STOP

#: Reports what it receives, a line each; begins with a line that says that it is ready.
PROGRAM = textwrap.dedent("""
    import trio
    from tmemfs.system.posix_signals import LEAVE, REOPEN_LOG, STOP, SignalInbox, ignore_others

    inbox = SignalInbox()
    inbox.install()
    ignore_others({*STOP, REOPEN_LOG, LEAVE})

    async def report(most):
        print("ready", flush=True)
        for _ in range(most):
            print((await inbox.receive()).name, flush=True)

    trio.run(report, 2)
    trio.run(report, 1000)
""")
FATAL_BY_DEFAULT = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None and started.stdout.readline() == "ready\n"
        yield started
        started.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_no_signal_ends_it_and_those_that_are_obeyed_arrive(process: subprocess.Popen[str]) -> None:
    obeyed = {*STOP, REOPEN_LOG, LEAVE}
    for number in FATAL_BY_DEFAULT:
        os.kill(process.pid, number)
        if number in obeyed:
            while (line := said(process)) == "ready":  # the second event loop has begun meanwhile
                pass
            assert line == signal.Signals(number).name
    assert process.poll() is None
    state = Path(f"/proc/{process.pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    assert state in (b"S", b"R")  # not stopped either


def test_a_fault_of_its_own_still_ends_a_process() -> None:
    program = PROGRAM.split("async def")[0] + "import ctypes\nctypes.string_at(0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=HANG_S, check=False)
    assert done.returncode == -signal.SIGSEGV


def test_signals_between_two_event_loops_are_kept() -> None:
    program = PROGRAM.split("trio.run")[0] + textwrap.dedent("""
        import os, signal
        trio.run(report, 0)
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
        trio.run(report, 2)
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_S, check=True)
    assert done.stdout.split() == ["ready", "ready", "SIGHUP", "SIGTERM"]


def test_a_flood_of_one_signal_hides_no_other() -> None:
    program = PROGRAM.split("trio.run")[0] + textwrap.dedent("""
        import os, signal
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            os.kill(os.getpid(), signal.SIGHUP)
        trio.run(report, 2)
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["ready", "SIGTERM", "SIGHUP"]
