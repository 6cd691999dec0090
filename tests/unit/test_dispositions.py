"""Signals that a caller ignores or blocks: neither the tests nor what the tools start and end by a signal may inherit that."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.signals import NEEDED, usual_signals
from tools.bench.limited import started


@contextmanager
def ignored(*numbers: signal.Signals) -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [number for number in NEEDED if number != signal.SIGALRM])  # that one ends a test that hangs
def test_no_signal_is_ignored_while_tests_run_and_it_is_again_after(number: signal.Signals) -> None:
    assert signal.getsignal(number) is not signal.SIG_IGN
    with ignored(number):
        with usual_signals():
            assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
        assert signal.getsignal(number) is signal.SIG_IGN


def test_no_signal_is_blocked_while_tests_run() -> None:
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        with usual_signals():
            assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {signal.SIGINT}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_handler_that_somebody_set_stays() -> None:
    def handler(*_: object) -> None: ...

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with usual_signals():
            assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_program_that_a_signal_ends_is_ended_by_it_though_the_caller_ignores_it(tmp_path: Path) -> None:
    with (
        ignored(signal.SIGINT),
        started([sys.executable, "-c", "import time; time.sleep(1000)"], tmp_path / "log", signal.SIGINT) as process,
    ):
        pass
    assert process.returncode == -signal.SIGINT or "KeyboardInterrupt" in (tmp_path / "log").read_text()
