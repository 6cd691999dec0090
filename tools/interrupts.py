"""Interrupts of tools that leave nothing behind: the first signal ends what goes on, and nothing interrupts the ending."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
#: What a caller may ignore, and its children with it: nohup does so with SIGHUP, a shell with SIGINT in its background jobs.
_INHERITED: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD)


@contextmanager
def interruptible(does: str) -> Iterator[None]:
    """SIGTERM and SIGINT end what is within, once, and say what that `does`."""

    def once(number: int, frame: FrameType | None) -> None:
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
    """No signal ignored or blocked. For a child (`preexec_fn`) that is ended by one: our own caller may ignore it."""
    for one in _INHERITED:
        signal.signal(one, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


@contextmanager
def uninterrupted() -> Iterator[None]:
    """No signal between what is done and the registration of what undoes it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
