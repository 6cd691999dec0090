"""Which swap lies on our image, told by the kernel when it is turned on or off.

Nothing here asks the daemon that serves the image, so the daemon may call it in any thread but the page path's. Sources: proc(5)
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
    """A swap that is on, over a loop device over the image. What `has_requests` needs is opened here."""

    def __init__(self, device: str, sys_block: Path) -> None:
        self.device = device
        self._fd: int | None = None
        with suppress(OSError):
            self._fd = os.open(sys_block / device / "inflight", os.O_RDONLY | os.O_CLOEXEC)

    def has_requests(self) -> bool:
        """Whether the kernel waits for something that it asked of the device; so it is taken to be where that is not told."""
        if self._fd is None:
            return True
        try:
            return any(map(int, os.pread(self._fd, _READ_BYTES, 0).split()))
        except (OSError, ValueError):
            return True

    def close(self) -> None:
        """Release the descriptor."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class SwapWatch:
    """Watches the table of swaps for one over `mountpoint`/swap. `mountpoint` is the path as the kernel names it, without links."""

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
        with suppress(PermissionError):  # an ordinary file, as in tests, cannot be polled
            self._poll.register(self._fd, select.EPOLLPRI)

    def fileno(self) -> int:
        """Readable when a swap was turned on or off."""
        return self._poll.fileno()

    def clear(self) -> None:
        """Ready for the next change. To be called before `look`: a change after that is told again."""
        self._poll.poll(0)

    def look(self) -> str | None:
        """The loop device that is a swap over our image now, by its name, or None."""
        devices = [device for device in self._loop_devices() if device == self._found or self._is_ours(device)]
        # one that was ours stays ours while it is on, also after its mount was detached and its path says nothing more
        self._found = self._found if self._found in devices else next(iter(devices), None)
        return self._found

    def open(self, device: str) -> ImageSwap:
        """What is to be known about the swap on `device`."""
        return ImageSwap(device, self._sys_block)

    def close(self) -> None:
        """Release the descriptors."""
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
        return backing == _IMAGE and not swapdev.is_mounted(self._mountpoint, self._mounts)
