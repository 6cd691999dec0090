"""The kernel's limit for the wake-up latency of CPUs (PM QoS): while it is 0, an idle CPU polls for work and does not halt.

A request lasts until its descriptor is closed, so it ends with the process, however that ends. Changing it takes no memory. The
kernel applies the lowest of all requests, to every CPU of the machine.

Also what idle CPUs do otherwise.

Sources: Documentation/power/pm_qos_interface.rst, Documentation/virt/guest-halt-polling.rst, kernel/power/qos.c
(cpu_latency_qos_write), drivers/cpuidle/governors.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tmemfs.errors import Refused
from tmemfs.system import proctext

DEVICE: Final = Path("/dev/cpu_dma_latency")
CPUIDLE: Final = Path("/sys/devices/system/cpu/cpuidle")
#: For how long the governor haltpoll polls; 200000 is the kernel's own default, and some guests have 0.
POLL_NS: Final = Path("/sys/module/haltpoll/parameters/guest_halt_poll_ns")
#: One value in microseconds, in binary. The kernel takes -1 for its default, which is no limit.
_VALUE: Final = struct.Struct("=i")
_AWAKE: Final = _VALUE.pack(0)
_NO_LIMIT: Final = _VALUE.pack(-1)


class CpuLatency:
    """A request at `device`, which asks for nothing at first. Raises Refused."""

    def __init__(self, device: Path = DEVICE) -> None:
        try:
            self._fd = os.open(device, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Refused(f"idle CPUs cannot be kept awake ({error.strerror}): give the daemon {device}, or choose auto") from error

    def keep_awake(self) -> None:
        """Have idle CPUs poll. Raises OSError."""
        os.pwrite(self._fd, _AWAKE, 0)

    def let_halt(self) -> None:
        """Ask for nothing any more. Raises OSError."""
        os.pwrite(self._fd, _NO_LIMIT, 0)

    def close(self) -> None:
        """End the request."""
        os.close(self._fd)


def check_device(device: Path = DEVICE) -> None:
    """Raise Refused if idle CPUs cannot be kept awake. Changes nothing."""
    CpuLatency(device).close()


@dataclass(frozen=True, slots=True)
class Idle:
    """What idle CPUs do. `poll_ns`: how long they poll before they halt; None where the governor is not haltpoll."""

    driver: str
    governor: str
    poll_ns: int | None


def idle(cpuidle: Path = CPUIDLE, poll_ns: Path = POLL_NS) -> Idle:
    """What idle CPUs do on this machine; `none` where the kernel has no such driver. Raises OSError."""
    governor = _word(cpuidle / "current_governor_ro")
    return Idle(
        _word(cpuidle / "current_driver"), governor, int(_word(poll_ns)) if governor == "haltpoll" and poll_ns.exists() else None
    )


def _word(file: Path) -> str:
    return proctext.word_of(file.read_bytes()) if file.exists() else "none"
