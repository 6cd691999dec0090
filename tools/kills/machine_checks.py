"""What the machine says of a run: errors of our devices in the kernel's log, and processes that wait for ever.

Source: Documentation/ABI/testing/dev-kmsg.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from tools.kills.worker import state_of

_RECORD_BYTES: Final = 8192
_FAULT: Final = re.compile(
    r"I/O error|-error on swap-device|critical \w+( \w+)? error|EXT4-fs (error|warning)|JBD2.*error|lost async page write"
)
_HUNG: Final = re.compile(r"INFO: task .* blocked for more than|soft lockup|kernel BUG|BUG: unable")
_SAMPLES: Final = 10
_SAMPLED_S: Final = 0.3


class KernelLog:
    """The kernel's log from now on."""

    def __init__(self, device: Path = Path("/dev/kmsg")) -> None:
        self._fd = os.open(device, os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._fd, 0, os.SEEK_END)

    def lines(self) -> list[str]:
        """The lines since the last call."""
        found = list[str]()
        while True:
            try:
                record = os.read(self._fd, _RECORD_BYTES)
            except BlockingIOError:
                return found
            except OSError as error:
                # the oldest records were overwritten before they were read: the next ones follow
                if error.errno != errno.EPIPE:
                    raise
                continue
            found.append(record.decode(errors="replace").partition(";")[2].splitlines()[0])

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)


def kernel_faults(lines: Iterable[str], devices: Collection[str]) -> list[str]:
    """The lines that tell of an error of a device in `devices` (names such as loop3 and numbers such as 7:3), or of a hang.

    What other programs of this machine do to other devices is ignored.
    """
    ours = re.compile("|".join(rf"(?<![\w:]){re.escape(device)}(?![\w])" for device in devices)) if devices else None
    return [line for line in lines if _HUNG.search(line) or (_FAULT.search(line) and ours is not None and ours.search(line))]


def names_of(device: str) -> tuple[str, str]:
    """The names by which the kernel's log calls the block device at a path: its name and its number."""
    number = os.stat(device).st_rdev
    return Path(device).name, f"{os.major(number)}:{os.minor(number)}"


def waiting() -> dict[int, str]:
    """The processes and kernel threads that wait uninterruptibly (state D) now, with their names."""
    found = dict[int, str]()
    for entry in Path("/proc").glob("[0-9]*"):
        if state_of(int(entry.name)) == "D":
            with suppress(OSError):
                found[int(entry.name)] = (entry / "comm").read_text().strip()
    return found


def stuck() -> list[str]:
    """Those that wait uninterruptibly in each of several looks; one that only waits for a disk is seen in few of them."""
    ever = waiting()
    for _ in range(_SAMPLES):
        if not ever:
            break
        time.sleep(_SAMPLED_S)
        now = waiting()
        ever = {pid: name for pid, name in ever.items() if pid in now}
    return [f"process {pid} ({name}) waits uninterruptibly" for pid, name in ever.items()]
