"""Which swap lies on our image. The kernel reports when a swap is turned on or off.

Nothing here sends a request to the daemon that serves the image, so the daemon may use it in any thread except those of the page
path. Sources: proc(5)
(/proc/swaps can be polled: mm/swapfile.c, swaps_poll), drivers/block/loop.c (backing_file), Documentation/block/stat.rst
(inflight).
"""

from __future__ import annotations

import os
import select
from contextlib import suppress
from pathlib import Path
from typing import Final

from tmemfs.system import proctext, swapdev

_READ_BYTES: Final = 64
_TABLE_BYTES: Final = 4096
_IMAGE: Final = b"/swap"


class ImageSwap:
    """An active swap, over a loop device over the image."""

    def __init__(self, device: str, sys_block: Path) -> None:
        self.device = device
        self._fd: int | None = None
        # now: `has_requests` is for when memory is short, and opening a file takes some
        with suppress(OSError):
            self._fd = os.open(sys_block / device / "inflight", os.O_RDONLY | os.O_CLOEXEC)

    def has_requests(self) -> bool:
        """Whether the kernel waits for a request to the device; True if that cannot be read."""
        if self._fd is None:
            return True
        try:
            return any(map(int, os.pread(self._fd, _READ_BYTES, 0).split()))
        except (OSError, ValueError):
            return True

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class SwapWatch:
    """Watches the kernel's table of swaps for one over `mountpoint`/swap. `mountpoint` has no symbolic links."""

    def __init__(
        self,
        mountpoint: Path,
        swaps: Path = swapdev.PROC_SWAPS,
        sys_block: Path = swapdev.SYS_BLOCK,
        mounts: Path = swapdev.PROC_MOUNTS,
    ) -> None:
        self._mountpoint = mountpoint
        self._mounts = mounts
        self._sys_block = sys_block
        self._image = os.fsencode(mountpoint) + _IMAGE
        self._found: str | None = None
        self._fd = os.open(swaps, os.O_RDONLY | os.O_CLOEXEC)
        self._poll = select.epoll()
        # an ordinary file, as in tests, cannot be polled
        with suppress(PermissionError):
            self._poll.register(self._fd, select.EPOLLPRI)

    def fileno(self) -> int:
        """A descriptor that is readable after a swap was turned on or off."""
        return self._poll.fileno()

    def clear(self) -> None:
        """Reset the descriptor. To be called before `look`, so that a change after it is reported again."""
        self._poll.poll(0)

    def look(self) -> str | None:
        """The name of the loop device that is a swap over our image now, or None."""
        devices = [device for device in self._loop_devices() if device == self._found or self._is_ours(device)]
        # a swap that was ours stays ours while it is on: once the mount is detached, its path no longer shows that
        self._found = self._found if self._found in devices else next(iter(devices), None)
        return self._found

    def open(self, device: str) -> ImageSwap:
        """The swap on `device`."""
        return ImageSwap(device, self._sys_block)

    def close(self) -> None:
        """Close the files."""
        self._poll.close()
        os.close(self._fd)

    def _loop_devices(self) -> list[str]:
        table = b""
        while more := os.pread(self._fd, _TABLE_BYTES, len(table)):
            table += more
        names = [entry.path.removeprefix("/dev/") for entry in proctext.parse_swaps(table)]
        return [name for name in names if name.startswith("loop") and "/" not in name]

    def _is_ours(self, device: str) -> bool:
        try:
            backing = (self._sys_block / device / "loop/backing_file").read_bytes().removesuffix(b"\n")
        except OSError:
            return False
        if backing == self._image:
            return True
        # the kernel shows a path relative to the mount once the mount is detached
        return backing == _IMAGE and not swapdev.is_mounted(self._mountpoint, self._mounts)
