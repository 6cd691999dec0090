"""The kernel's unbound workers, through which the loop device sends us the requests of the swap.

Such a worker allocates a little memory for each request. The kernel does not know that it frees memory, so it waits like any
program when no page is free above the minimum watermark. But the swap write that it should send is what would free a page. With a
real-time priority the kernel lets it allocate below that watermark, as it lets us (memory.realtime).

Any unbound worker may get the next request of the loop device, so all need the priority while memory is short. New workers start
without it. A worker whose scheduling somebody else has set is left alone. Several daemons may do this at once: one that ends takes
the priority from all workers, and the others give it again at their next check. So the priority is always read from the kernel and
never remembered. Sources: the kernel's drivers/block/loop.c (an unbound workqueue), mm/page_alloc.c (gfp_to_alloc_flags), proc(5).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Final

from tmemfs.system import proctext

#: Unbound ones, of any niceness; 'kworker/0:1' is bound to a core.
_UNBOUND: Final = re.compile(rb"kworker/u[0-9]+:[0-9]+(?:[-+ \n]|$)")
#: The lowest real-time priority: enough for the reserve, and below every other real-time task.
_OURS: Final = (os.SCHED_RR, 1)


class KernelWorkers:
    """The unbound workers of the kernel, and which of them have our priority; none without the right to give it."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._seen: set[int] = set()
        self._unbound: set[int] = set()
        self._raised: frozenset[int] = frozenset()

    @property
    def raised(self) -> int:
        """How many had our priority after the last change."""
        return len(self._raised)

    def with_priority(self) -> frozenset[int]:
        """Process ids of the workers that have exactly our priority now, no matter who gave it."""
        self._find()
        return frozenset(pid for pid in self._unbound if _scheduling(pid) == _OURS)

    def give_priority(self, kept: Collection[int] = ()) -> None:
        """Give the lowest real-time priority to every worker with ordinary scheduling. `kept` had the priority before us."""
        self._find()
        raised = set[int]()
        for pid in self._unbound:
            found = _scheduling(pid)
            # the name is read again: the worker may have ended, and another thread may have its number
            if found == (os.SCHED_OTHER, 0) and self._is_unbound(pid) and _set(pid, *_OURS):
                found = _OURS
            if found == _OURS and pid not in kept:
                raised.add(pid)
        self._raised = frozenset(raised)

    def take_priority(self, kept: Collection[int] = ()) -> bool:
        """Give ordinary priority to all workers with our priority, except `kept`. Whether none is left with it."""
        left = {pid for pid in self.with_priority() - frozenset(kept) if self._is_unbound(pid)}
        self._raised = frozenset(pid for pid in left if not _set(pid, os.SCHED_OTHER, 0) and _scheduling(pid) == _OURS)
        # by the next shortage of memory these numbers may belong to other threads
        self._seen.clear()
        self._unbound.clear()
        return not self._raised

    def _find(self) -> None:
        """Update the known workers. All are children of kthreadd; only the names of new threads are read."""
        # at every check while memory is short: this is one file to read instead of one per thread
        try:
            found = set(map(int, proctext.fields((self._proc / "2/task/2/children").read_bytes())))
        except OSError:
            found = set()
        self._unbound &= found
        self._unbound |= {pid for pid in found - self._seen if self._is_unbound(pid)}
        self._seen = found

    def _is_unbound(self, pid: int) -> bool:
        with suppress(OSError):
            return _UNBOUND.match((self._proc / str(pid) / "comm").read_bytes()) is not None
        return False


def _scheduling(pid: int) -> tuple[int, int] | None:
    """Policy and priority of a thread, None if it has ended."""
    with suppress(OSError):
        return os.sched_getscheduler(pid), os.sched_getparam(pid).sched_priority
    return None


def _set(pid: int, policy: int, priority: int) -> bool:
    """Set policy and priority of a thread; whether that was possible."""
    with suppress(OSError):
        os.sched_setscheduler(pid, policy, os.sched_param(priority))
        return True
    return False
