"""One number below /proc/sys.

Its file is opened once, before memory is short, so that reading and writing it later needs no new descriptor and almost no memory.
Where the file or the right to write it is missing there is no number, and nothing is changed. Source: proc(5).
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

_READ_BYTES: Final = 32


class Sysctl:
    """A number that may be read and written, or nothing."""

    def __init__(self, file: Path) -> None:
        self._fd: int | None = None
        with suppress(OSError):
            self._fd = os.open(file, os.O_RDWR | os.O_CLOEXEC)

    def read(self) -> int | None:
        """The number now, or None."""
        if self._fd is None:
            return None
        with suppress(OSError, ValueError):
            return int(os.pread(self._fd, _READ_BYTES, 0).partition(b"\n")[0])
        return None

    def write(self, value: int) -> bool:
        """Write the number; whether that was possible."""
        if self._fd is None:
            return False
        # the kernel refuses values out of its range; the caller then goes on with the old one
        with suppress(OSError):
            os.pwrite(self._fd, b"%d\n" % value, 0)
            return True
        return False

    def close(self) -> None:
        """Close the file; there is no number from then on."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
