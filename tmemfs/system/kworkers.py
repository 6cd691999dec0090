"""The kernel's workers: what the loop device of the swap sends its requests to us with.

Such a worker allocates a little for each request. In the kernel's eyes it frees no memory, so it waits like any program when no
page is free above the minimum watermark; and the swap write that would free one is what it was to send. With a real-time priority
the kernel lets it go below that watermark, as it lets us (memory.realtime).

Any worker may get the loop device's next request, so all have to have it while memory is short; new ones start without. A worker
whose scheduling somebody else has set is left alone. Several daemons may do this at once: one that ends takes the priority from
all, and the others give it again at their next look. So what has priority is always read from the kernel, never remembered.
Sources: the kernel's drivers/block/loop.c (an unbound workqueue), mm/page_alloc.c (gfp_to_alloc_flags), proc(5).
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
_OURS: Final = (os.SCHED_RR, 1)


class KernelWorkers:
    """The unbound workers of the kernel, and which of them have our priority. Without the right to give it, none."""

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
        """Process ids of those that have exactly our priority now, whoever gave it."""
        self._find()
        return frozenset(pid for pid in self._unbound if _scheduling(pid) == _OURS)

    def give_priority(self, kept: Collection[int] = ()) -> None:
        """The lowest real-time priority for every worker that has ordinary scheduling now. `kept` had that priority before us."""
        self._find()
        raised = set[int]()
        for pid in self._unbound:
            found = _scheduling(pid)
            if found == (os.SCHED_OTHER, 0) and self._is_unbound(pid) and _set(pid, *_OURS):
                found = _OURS
            if found == _OURS and pid not in kept:
                raised.add(pid)
        self._raised = frozenset(raised)

    def take_priority(self, kept: Collection[int] = ()) -> bool:
        """Ordinary priority for all with exactly our priority, but not for `kept`. Whether none is left with it."""
        left = {pid for pid in self.with_priority() - frozenset(kept) if self._is_unbound(pid)}
        self._raised = frozenset(pid for pid in left if not _set(pid, os.SCHED_OTHER, 0) and _scheduling(pid) == _OURS)
        self._seen.clear()  # until the next shortage a number may come to belong to another thread
        self._unbound.clear()
        return not self._raised

    def _find(self) -> None:
        """Bring what is known up to date: names are read of threads that are new only, all of them children of kthreadd."""
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
    """Policy and priority of a thread that is still there."""
    with suppress(OSError):
        return os.sched_getscheduler(pid), os.sched_getparam(pid).sched_priority
    return None


def _set(pid: int, policy: int, priority: int) -> bool:
    """Whether it was set."""
    with suppress(OSError):
        os.sched_setscheduler(pid, policy, os.sched_param(priority))
        return True
    return False
