"""Last words: the stacks of a child process, which dumps them when it is told to, or when it crashes, for its parent to read.

The dump goes to a memfd: the parent reads it after the child has ended, and no file is written.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from contextlib import suppress
from typing import Final

_LONGEST_DUMP: Final = 32 << 10
#: A process that is told to dump its stacks has this long to do it. One that could not be reached by a signal does not.
_DUMP_S: Final = 0.5
_DUMP: Final = signal.SIGRTMAX
_FAULTS: Final = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT)


class LastWords:
    """Made in the parent; `listen` is called in the child."""

    def __init__(self) -> None:
        self._dump = os.memfd_create("tmemfs-stacks", os.MFD_CLOEXEC)

    def listen(self) -> None:
        """In the child: dump the stacks on demand, and in a crash."""
        for number in _FAULTS:
            # The parent ignores them, and so would this process after its dump, if somebody else sent them.
            signal.signal(number, signal.SIG_DFL)
        faulthandler.register(_DUMP, file=self._dump, all_threads=True)
        faulthandler.disable()  # where it was enabled before, its handlers have been replaced since
        faulthandler.enable(file=self._dump, all_threads=True)

    def ask(self, child: int) -> None:
        """Have process `child` write where its threads are; returns when that is done, or cannot be."""
        with suppress(ProcessLookupError):
            os.kill(child, _DUMP)
            os.kill(child, signal.SIGCONT)  # a stopped process takes no signal
        size, deadline = -1, time.monotonic() + _DUMP_S
        # Until it has begun, and does not grow any more.
        while time.monotonic() < deadline and (size <= 0 or size != os.fstat(self._dump).st_size):
            size = os.fstat(self._dump).st_size
            time.sleep(_DUMP_S / 10)

    def take(self) -> str:
        """What the last child dumped; forgotten with that."""
        found = os.pread(self._dump, _LONGEST_DUMP, 0)
        os.ftruncate(self._dump, 0)
        os.lseek(self._dump, 0, os.SEEK_SET)
        return found.decode(errors="replace")
