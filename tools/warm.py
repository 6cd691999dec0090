"""Use memory once, so that the machine has it: what is measured then is not how its host finds memory for it.

A virtual machine's memory is found by its host when it is first used, at 0.46 to 0.58 GB/s where this was written; used again it is
taken at 3.9 GB/s. So a swap that is measured first, or one that needs more memory, would look slow, or a hog in its way.
"""

from __future__ import annotations

import mmap
from contextlib import closing

from tmemfs.system.pressure_signals import PressureSignals


def use_memory(size_bytes: int) -> None:
    """Fault `size_bytes` in, or half of what can be had, here or in our cgroup, if that is less, and give them back."""
    with closing(PressureSignals()) as signals:
        size_bytes = min(size_bytes, signals.memory().headroom // 2) // mmap.PAGESIZE * mmap.PAGESIZE
    mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()
