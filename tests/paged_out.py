"""Memory of a process that is swapped out to a tmemfs, for as long as a test wants it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tests.mounted import Place
from tests.waiting import wait_until
from tmemfs.system import swapdev
from tmemfs.units import MIB

#: Has the kernel fill a swap before all others.
FIRST: Final = ("--priority", "32767")
_PROGRAM: Final = f"""
import mmap, os, sys
memory = mmap.mmap(-1, {8 * MIB}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.write(os.urandom({8 * MIB}))
memory.madvise(21)  # MADV_PAGEOUT
sys.stdin.read()
"""


@contextmanager
def paged_out(place: Place) -> Iterator[None]:
    """Some MiB of a process are in the swap of `place`, which was turned on with FIRST."""
    with subprocess.Popen([sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE) as holder:
        try:
            wait_until(lambda: swapped_bytes(place) > MIB)
            yield
        finally:
            holder.kill()


def swapped_bytes(place: Place) -> int:
    """What is swapped out to `place`."""
    entries = [swapdev.swap_on_device(device) for device in swapdev.loop_devices_of(place.image)]
    return sum(entry.used_bytes for entry in entries if entry)
