"""The key of one mount: random bytes in locked shared memory, which end with the last process that has them.

Nothing here writes the key anywhere or copies it: the kernel fills the memory, and a cipher reads it there. It is a memfd, so it
passes to another process by fork, or by its descriptor through exec (`Key.adopt`).

What cannot be avoided: a cipher's context holds the round keys, from which the key can be computed, in the heap of the process.
That is locked, and the process writes no core file (memory_safety.py), but when it is overwritten is not ours to say.

Constant after construction. Sources: getrandom(2), memfd_create(2), madvise(2) MADV_DONTDUMP.
"""

from __future__ import annotations

import mmap
import os
from typing import Final

from tmemfs.system import memory

#: For AES-256.
KEY_BYTES: Final = 32


class Key:
    """KEY_BYTES at `view`, behind the descriptor `fd`. `lock` says whether they are locked in RAM."""

    def __init__(self, fd: int) -> None:
        self.fd: Final = fd
        self._map: Final = mmap.mmap(fd, mmap.PAGESIZE)
        self._map.madvise(mmap.MADV_DONTDUMP)
        # Before it is filled: a key that was swapped out once, by another swap, stays on that disk.
        self.lock: Final = memory.lock_region(self._map, mmap.PAGESIZE)
        self.view: Final = memoryview(self._map)[:KEY_BYTES]

    @classmethod
    def create(cls) -> Key:
        """A new random key. Raises OSError."""
        fd = os.memfd_create("tmemfs-key", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            key = cls(fd)
            memory.fill_random(key.view)
        except BaseException:
            os.close(fd)
            raise
        return key

    @classmethod
    def adopt(cls, fd: int) -> Key:
        """The key that `create` has put behind `fd`, in this process or in another. Raises OSError, ValueError."""
        return cls(fd)

    def close(self) -> None:
        """Close the descriptor; the memory is unmapped once no cipher borrows from it any more."""
        os.close(self.fd)

    def forget(self) -> None:
        """Overwrite the key, for all who have it, and close it: what was encrypted with it cannot be read from now on."""
        self.view[:] = bytes(KEY_BYTES)
        self.close()
