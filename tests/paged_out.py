"""Memory of a process that is swapped out to a tmemfs, for as long as a test wants it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tests.mounted import Place
from tests.waiting import readable
from tmemfs.system import swapdev
from tmemfs.units import MIB, PAGE_BYTES

#: Has the kernel fill a swap before all others.
FIRST: Final = ("--priority", "32767")
_BYTES: Final = 8 * MIB
#: What was written stays in the swap cache until it is reclaimed, and a swapoff takes it from there. Once it is clean, it leaves.
_PROGRAM: Final = f"""
import ctypes, mmap, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
memory = mmap.mmap(-1, {_BYTES}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.write(os.urandom({_BYTES}))
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
resident = (ctypes.c_ubyte * {_BYTES // PAGE_BYTES})()
while True:
    memory.madvise(21)  # MADV_PAGEOUT
    if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t({_BYTES}), resident):
        sys.exit(os.strerror(ctypes.get_errno()))
    if sum(resident) < len(resident) // 2:
        break
    time.sleep(0.05)
    for at in range(0, {_BYTES}, {PAGE_BYTES}):
        memory[at]
print("out", flush=True)
sys.stdin.read()
"""


@contextmanager
def paged_out(place: Place) -> Iterator[None]:
    """Some MiB of a process are in the swap of `place`, which was turned on with FIRST."""
    with subprocess.Popen([sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None and readable(holder.stdout.fileno()) and holder.stdout.readline() == b"out\n"
            assert swapped_bytes(place) > MIB
            yield
        finally:
            holder.kill()


def swapped_bytes(place: Place) -> int:
    """What is swapped out to `place`."""
    entries = [swapdev.swap_on_device(device) for device in swapdev.loop_devices_of(place.image)]
    return sum(entry.used_bytes for entry in entries if entry)
