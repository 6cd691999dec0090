"""Resource limits (ulimit) that would end or cripple a daemon in the middle of its work.

Soft limits are raised to the hard ones, which is always allowed, and with CAP_SYS_RESOURCE the hard ones too. A limit that is still
too low is refused before anything is mounted. Source: getrlimit(2).
"""

from __future__ import annotations

import resource
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from tmemfs.errors import Refused

_UNLIMITED: Final = resource.RLIM_INFINITY


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit: its number, what the daemon needs, its name in messages, and its letter in `ulimit`."""

    number: int
    needed: int
    what: str
    letter: str


#: A daemon has about 40 files open, and 20 more while it examines the machine's devices.
_LIMITS: Final = (
    Limit(resource.RLIMIT_NOFILE, 256, "open files", "n"),
    Limit(resource.RLIMIT_FSIZE, _UNLIMITED, "the size of a file", "f"),  # regions of state are files (memfd), as large as RAM
    Limit(resource.RLIMIT_AS, _UNLIMITED, "address space", "v"),
    Limit(resource.RLIMIT_DATA, _UNLIMITED, "data", "d"),
    Limit(resource.RLIMIT_CPU, _UNLIMITED, "CPU time", "t"),  # at its end the kernel kills the process
    Limit(resource.RLIMIT_RTTIME, _UNLIMITED, "real-time CPU time", "R"),
)  # fmt: skip


def raise_limits() -> None:
    """Raise the limits of this process to what a daemon needs. Raises Refused, naming the limit, where that is not allowed."""
    for limit in _LIMITS:
        soft, hard = resource.getrlimit(limit.number)
        if _at_least(soft, limit.needed):
            continue
        # first without a privilege; a refusal here or below shows in what getrlimit(2) returns at the end
        wanted = limit.needed if _at_least(hard, limit.needed) else hard
        with suppress(OSError, ValueError):
            resource.setrlimit(limit.number, (wanted, hard))
        if not _at_least(hard, limit.needed):
            with suppress(OSError, ValueError):
                resource.setrlimit(limit.number, (limit.needed, limit.needed))
        soft, _ = resource.getrlimit(limit.number)
        if not _at_least(soft, limit.needed):
            needed = "unlimited" if limit.needed == _UNLIMITED else str(limit.needed)
            raise Refused(
                f"the limit on {limit.what} is {soft} here, and a daemon needs {needed}: "
                f"run 'ulimit -{limit.letter} {needed}' as root first, or start it from a service"
            )


def _at_least(value: int, needed: int) -> bool:
    return value == _UNLIMITED or (needed != _UNLIMITED and value >= needed)
