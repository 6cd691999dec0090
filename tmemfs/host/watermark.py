"""The kernel's minimum watermark: free memory that it keeps from everybody but itself and a few.

Lowered for moments, so that who waits for a page above it has one. Not raised for fragmented memory while a swap is served: the
kernel raises it by some megabytes then, for everybody, and what is free below it frees nobody. Sources:
Documentation/admin-guide/sysctl/vm.rst (min_free_kbytes, watermark_boost_factor), mm/page_alloc.c (boost_watermark).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_FILE: Final = Path("/proc/sys/vm/min_free_kbytes")
_BOOST: Final = Path("/proc/sys/vm/watermark_boost_factor")
_READ_BYTES: Final = 32


@contextmanager
def no_boost(file: Path = _BOOST) -> Iterator[bool]:
    """No raising of the watermark inside; gives whether that could be had. As it was afterwards, unless somebody has set it."""
    usual, is_off = "0", False
    with suppress(OSError):
        usual = file.read_text().strip()
        if usual != "0":
            file.write_text("0")
        is_off = True
    try:
        yield is_off
    finally:
        with suppress(OSError):
            if is_off and usual != "0" and file.read_text().strip() == "0":
                file.write_text(usual)


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
