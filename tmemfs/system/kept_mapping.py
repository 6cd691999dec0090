"""A kept mapping: pages of a shared region stay mapped and locked in the process that made it, whatever becomes of its children.

The kernel takes a page of a memfd for locked while a process has it mapped in a locked mapping. The supervisor's mapping of the
arena is locked on fault. But it is the worker that faults frames in, into its own mapping, and that ends with the worker. Until the
next worker has mapped the frame, the kernel could swap it out, to the very swap that nobody serves then. So the worker also faults
each frame into the mapping of the supervisor: it reads a byte of it through /proc/self/mem, which the supervisor opened.

The supervisor does nothing for it and is not woken. A read maps the pages around it that are in memory (fault-around, 64 KiB), so
16 reads map a frame: 60 us, where to fault the frame in takes 600 us.

Sources: proc(5), mlock(2); mm/memory.c (do_fault_around), mm/mlock.c.
"""

from __future__ import annotations

import ctypes
import os
from itertools import chain
from mmap import mmap
from typing import Final

#: What the kernel maps around a fault: 64 KiB unless debugfs says otherwise, then less is mapped and the rest is not kept.
_FAULT_AROUND_BYTES: Final = 64 << 10


class KeptMapping:
    """Keeps parts of `mapping` mapped in this process, for a process that it forks. Raises OSError where /proc is not mounted."""

    def __init__(self, mapping: mmap) -> None:
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self._memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)

    def keep(self, offset: int, length: int) -> None:
        """Map [offset, offset + length), whose pages are in memory, in the process that made this. Raises OSError."""
        start, end = self._address + offset, self._address + offset + length
        # The last byte too: the windows that the kernel maps are aligned, and `start` need not be.
        for address in chain(range(start, end, _FAULT_AROUND_BYTES), (end - 1,)):
            os.pread(self._memory, 1, address)

    def close(self) -> None:
        """Close the descriptor; what is mapped stays mapped."""
        os.close(self._memory)
