"""The kernel's minimum watermark: free memory that it keeps from everybody but itself and a few.

Lowered for moments, so that who waits for a page above it has one. Writing it also takes back what the kernel raised it by for
fragmented memory. Sources: Documentation/admin-guide/sysctl/vm.rst (min_free_kbytes), mm/page_alloc.c (setup_per_zone_wmarks).
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

_FILE: Final = Path("/proc/sys/vm/min_free_kbytes")
_READ_BYTES: Final = 32


class MinimumWatermark:
    """Opened once, before memory is short. Without the right to write it, nothing is changed."""

    def __init__(self, file: Path = _FILE) -> None:
        self._fd: int | None = None
        self._usual: bytes | None = None
        with suppress(OSError):
            self._fd = os.open(file, os.O_RDWR | os.O_CLOEXEC)

    def lower(self, share: float) -> bool:
        """To a share of what it was before the first call; whether it could be."""
        if self._fd is None:
            return False
        usual = self._usual or os.pread(self._fd, _READ_BYTES, 0)
        if self._write(b"%d" % int(int(usual) * share)):
            self._usual = usual
        return self._usual is not None

    def restore(self) -> None:
        """As it was; what fails is tried again at the next call."""
        if self._usual is not None and self._write(self._usual):
            self._usual = None

    def close(self) -> None:
        """As it was, and let go of it."""
        self.restore()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _write(self, kib: bytes) -> bool:
        """Whether it was taken."""
        assert self._fd is not None
        with suppress(OSError):
            os.pwrite(self._fd, kib, 0)
            return True
        return False
