"""Interrupts of tools that leave nothing behind: the first signal ends what goes on, and nothing interrupts the ending."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


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


@contextmanager
def uninterrupted() -> Iterator[None]:
    """No signal between what is done and the registration of what undoes it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
