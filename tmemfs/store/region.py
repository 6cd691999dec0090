"""A shared region of state: a memfd, mapped once.

The store's four regions (slots, segments, arena, requests) are memfds so that they can outlive the process that maps them.
Constant after construction. The memory is zero and not faulted in until it is touched, locked or populated.
"""

from __future__ import annotations

import mmap
import os


class Region:
    """`size_bytes` of memory with a name, a descriptor and one mapping. Raises OSError where the kernel refuses."""

    __slots__ = ("fd", "map", "name", "size_bytes", "view")

    def __init__(self, name: str, size_bytes: int, fd: int | None = None) -> None:
        """A new region, or the one of the same name and size behind `fd`, which another process left."""
        self.name = name
        self.size_bytes = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if fd is None:
            fd = os.memfd_create(f"tmemfs-{name}", os.MFD_CLOEXEC)
            os.ftruncate(fd, self.size_bytes)
        self.fd = fd
        self.map = mmap.mmap(self.fd, self.size_bytes)
        self.map.madvise(mmap.MADV_DONTDUMP)  # a core file must not hold pages, nor take as long to write as they are large
        self.view = memoryview(self.map)

    def words(self) -> memoryview:
        """The region as unsigned 64-bit words."""
        return self.view.cast("Q")

    def resident_bytes(self) -> int:
        """Memory the kernel holds for the region, whatever our own counters say."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Close the descriptor; the memory is unmapped once nothing borrows from it any more."""
        os.close(self.fd)
