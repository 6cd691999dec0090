"""The kernel's workers: what the loop device of the swap sends its requests to us with.

Such a worker allocates a little for each request. It is nobody who frees memory in the kernel's eyes, so it waits like any program
when no page is free above the minimum watermark; and the swap write that would free one is what it was to send. With a real-time
priority the kernel lets it go below that watermark, as it lets us (memory.realtime).

Any worker may get the loop device's next request, so all have to have it, while memory is short; new ones begin without. Sources:
the kernel's drivers/block/loop.c (an unbound workqueue), mm/page_alloc.c (gfp_to_alloc_flags), proc(5).
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Final

from tmemfs.host import proctext

#: Unbound ones, of any niceness; 'kworker/0:1' is bound to a core.
_UNBOUND: Final = re.compile(rb"kworker/u[0-9]+:[0-9]+(?:[-+ \n]|$)")


class KernelWorkers:
    """The unbound workers of the kernel, and which of them were given priority here. Without the right to give it, none."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._looked_at: set[int] = set()
        self._raised: set[int] = set()

    @property
    def raised(self) -> int:
        """How many have priority now."""
        return len(self._raised)

    def give_priority(self) -> None:
        """The lowest real-time priority for every worker that has come since the last call."""
        for pid in self._new():
            if self._is_unbound(pid):
                with suppress(OSError):
                    os.sched_setscheduler(pid, os.SCHED_RR, os.sched_param(1))
                    self._raised.add(pid)

    def take_priority(self) -> None:
        """Ordinary priority again for those that are still there."""
        for pid in filter(self._is_unbound, self._raised):
            with suppress(OSError):
                os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))
        self._raised.clear()
        self._looked_at.clear()

    def _is_unbound(self, pid: int) -> bool:
        with suppress(OSError):
            return _UNBOUND.match((self._proc / str(pid) / "comm").read_bytes()) is not None
        return False

    def _new(self) -> set[int]:
        """Threads of the kernel, children of kthreadd all of them, that were not looked at yet."""
        try:
            found = set(map(int, proctext.fields((self._proc / "2/task/2/children").read_bytes())))
        except OSError:
            return set()
        new = found - self._looked_at
        self._looked_at = found
        self._raised &= found
        return new
