"""Interrupts of tools that must leave nothing behind: the first signal ends the work, and no signal interrupts the cleanup."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
#: Signals that a caller, and so its children, may ignore: nohup ignores SIGHUP, a shell SIGINT in its background jobs.
_INHERITED: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD)


@contextmanager
def interruptible(does: str) -> Iterator[None]:
    """Have the first SIGTERM or SIGINT end the block, and print what that `does`."""

    def once(number: int, frame: FrameType | None) -> None:
        # before the exception: a second signal would interrupt the cleanup
        for one in _SIGNALS:
            signal.signal(one, signal.SIG_IGN)
        print(f"{signal.Signals(number).name}: {does}", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)

    before = {one: signal.signal(one, once) for one in _SIGNALS}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def usual_signals() -> None:
    """Ignore and block no signal. For a child (`preexec_fn`) that is ended by a signal: our own caller may ignore it."""
    for one in _INHERITED:
        signal.signal(one, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back signals between a step and the registration of what undoes it.

    To block them in this thread is not enough: the kernel gives a signal to any thread that does not block it, and Python runs the
    handler in the main thread all the same. Other threads are not interrupted by signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = list[int]()
    before = {one: signal.getsignal(one) for one in _SIGNALS}
    for one, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(one, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        for number in came[:1]:
            signal.raise_signal(number)
