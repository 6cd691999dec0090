"""POSIX signals of the daemon: only SIGKILL ends it while its swap is in use.

    SIGTERM, SIGINT, SIGQUIT   ask it to stop: it unmounts, unless the image is in use (shutdown.py decides)
    SIGHUP                     reopens the log, as logrotate expects
    SIGUSR2                    has a worker finish what its jobs have in hand, and end: the next one goes on (supervisor.py)
    all others                 are ignored, also those that would stop the process (SIGTSTP)

A fault of the process itself (SIGSEGV and the like) still ends it: the kernel does not let a process ignore those. The handlers are
installed once and never removed, so no failure of the code that acts on them restores the default actions.

Source: signal(7); kernel/signal.c (force_sig_info_to_task resets an ignored fault to its default).
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Final

import trio

STOP: Final = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGQUIT))
REOPEN_LOG: Final = signal.SIGHUP
LEAVE: Final = signal.SIGUSR2
#: Signals that the kernel ignores by default, or lets nobody ignore.
_LEFT_ALONE: Final = frozenset((signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH))


def ignore_others(taken: Collection[int]) -> None:
    """Ignore every signal that is not `taken`, as far as the kernel lets a process do that."""
    for number in signal.valid_signals() - set(taken) - _LEFT_ALONE:
        signal.signal(number, signal.SIG_IGN)


class SignalInbox:
    """Signals that have arrived and have not been received yet, each once, so that a flood of one hides no other."""

    def __init__(self) -> None:
        self._arrived: deque[int] = deque()
        self._wake: Callable[[], object] = lambda: None

    def install(self) -> None:
        """Take over the signals that are obeyed. To be called in the main thread.

        The others are left as they are: the supervisor ignores them, and its worker has handlers that write where its threads are.
        """
        for number in (*STOP, REOPEN_LOG, LEAVE):
            signal.signal(number, self._note)

    async def receive(self) -> signal.Signals:
        """The next signal, in order of arrival. For one task at a time."""
        while True:
            arrived, token = trio.Event(), trio.lowlevel.current_trio_token()
            self._wake = partial(token.run_sync_soon, arrived.set)
            # after `_wake` is set: a signal between the two would wake nobody
            if self._arrived:
                return signal.Signals(self._arrived.popleft())
            await arrived.wait()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number not in self._arrived:
            self._arrived.append(number)
        # between two runs of the event loop nobody receives it; it stays in the inbox for the next run
        with suppress(trio.RunFinishedError):
            self._wake()


class SignalPipe:
    """Signals for a process without an event loop, each once: `fd` is readable after one has arrived. SIGUSR2 is ignored."""

    def __init__(self) -> None:
        self._arrived: list[int] = []
        self.fd, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def install(self) -> None:
        """Take over all signals of the process."""
        taken = {*STOP, REOPEN_LOG}
        for number in taken:
            signal.signal(number, self._note)
        ignore_others(taken)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)

    def close(self) -> None:
        """Close its descriptors, in a process that has signals of its own."""
        os.close(self.fd)
        os.close(self._wake)

    def drain(self) -> None:
        """Have `fd` readable again only after the next signal."""
        with suppress(BlockingIOError):
            while os.read(self.fd, 64):
                pass

    def put_back(self, number: int) -> None:
        """What was taken could not be obeyed: it is the first to be taken again."""
        if number not in self._arrived:
            self._arrived.insert(0, number)

    def take(self) -> int | None:
        """The first signal that has arrived, None if there is none."""
        return self._arrived.pop(0) if self._arrived else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number not in self._arrived:
            self._arrived.append(number)
