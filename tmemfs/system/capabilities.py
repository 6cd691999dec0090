"""What this process may do: the capabilities that tmemfs needs (capabilities(7)). Changes nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from tmemfs.errors import Refused
from tmemfs.system.proctext import parse_keyed

#: Numbers of <linux/capability.h>.
CAP_IPC_LOCK: Final = 14
CAP_SYS_ADMIN: Final = 21
CAP_SYS_NICE: Final = 23
CAP_SYS_RESOURCE: Final = 24


def require_root() -> None:
    """Raise Refused if this process may not mount."""
    if not is_root():
        raise Refused("mounting and swapping need root: run it with sudo")


def is_root() -> bool:
    """Whether this process may mount and turn swap on."""
    # root in a container often lacks the capability, and would fail halfway
    return os.geteuid() == 0 and has_capability(CAP_SYS_ADMIN)


def has_capability(number: int) -> bool:
    """Whether the capability `number` is effective."""
    status = parse_keyed(Path("/proc/self/status").read_bytes(), b"CapEff:")
    return bool(int(status["CapEff"], 16) >> number & 1)
