"""POSIX signals of the daemon: nothing but SIGKILL ends it while its swap is in use.

    SIGTERM, SIGINT, SIGQUIT   ask it to stop: it unmounts, unless the image is in use (daemon.py decides)
    SIGHUP                     reopens the log, as logrotate expects
    all others                 are ignored, those that would stop the process (SIGTSTP) too

A fault of the process itself (SIGSEGV and the like) still ends it: the kernel does not let a process ignore those. The handlers are
installed once and never removed, so no failure of the code that obeys them brings the default actions back.

Source: signal(7); kernel/signal.c (force_sig_info_to_task resets an ignored fault to its default).
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Final

import trio

STOP: Final = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGQUIT))
REOPEN_LOG: Final = signal.SIGHUP
#: What the kernel ignores by default, or lets nobody ignore.
_LEFT_ALONE: Final = frozenset((signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH))


class SignalInbox:
    """Signals that have arrived and were not obeyed yet, each once: a flood of one says nothing new, and hides no other."""

    def __init__(self) -> None:
        self._arrived: deque[int] = deque()
        self._wake: Callable[[], object] = lambda: None

    def install(self) -> None:
        """Take over all signals of the process. In the main thread."""
        taken = {*STOP, REOPEN_LOG}
        for number in taken:
            signal.signal(number, self._note)
        for number in signal.valid_signals() - taken - _LEFT_ALONE:
            signal.signal(number, signal.SIG_IGN)

    async def receive(self) -> signal.Signals:
        """The next signal of those that are obeyed, in order of arrival. By one task at a time."""
        while True:
            arrived, token = trio.Event(), trio.lowlevel.current_trio_token()
            self._wake = partial(token.run_sync_soon, arrived.set)
            if self._arrived:
                return signal.Signals(self._arrived.popleft())
            await arrived.wait()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number not in self._arrived:
            self._arrived.append(number)
        with suppress(trio.RunFinishedError):  # nobody obeys between two runs of the event loop; it is kept for the next
            self._wake()
