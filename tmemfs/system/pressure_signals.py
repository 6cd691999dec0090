"""Signals of memory pressure that the machine gives: what is available, what is left of a cgroup's limit, stalls, thresholds.

Each may be missing; then it says why, and the others go on. Descriptors are opened once, before there is pressure, and reading one
allocates nothing that is not small. Sources: proc(5), the kernel's accounting/psi, admin-guide/cgroup-v2 and cgroup-v1/memory.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from tmemfs.system import proctext
from tmemfs.system.memory import total_ram_bytes

_MEMINFO: Final = Path("/proc/meminfo")
_PSI: Final = Path("/proc/pressure/memory")
_V1: Final = Path("/sys/fs/cgroup/memory")
_V2: Final = Path("/sys/fs/cgroup")
_READ_BYTES: Final = 8192
#: A trigger fires after STALL_US of stalls in WINDOW_US; a longer window where the shorter one is not allowed to us.
_TRIGGERS: Final = ("some 20000 500000", "some 50000 2000000")


class Memory(NamedTuple):
    """Bytes. `headroom` is what can be had still, in the system or below the limit of a cgroup; the rest is of the system.

    `available` can be had at once, without swapping; `under_write_back` is on its way to a disk or to swap.
    """

    headroom: int
    available: int
    under_write_back: int


class Available:
    """What is to be had in the system: MemAvailable, and half of what can be swapped out and has a place in swap."""

    name = "available memory"

    def __init__(self) -> None:
        self._fd = os.open(_MEMINFO, os.O_RDONLY | os.O_CLOEXEC)

    def memory(self) -> Memory:
        """As it is now."""
        text = os.pread(self._fd, _READ_BYTES, 0)
        anon = _kilobytes(text, b"\nActive(anon):") + _kilobytes(text, b"\nInactive(anon):")
        available = _kilobytes(text, b"\nMemAvailable:")
        headroom = available + min(anon, _kilobytes(text, b"\nSwapFree:")) // 2
        return Memory(headroom * 1024, available * 1024, _kilobytes(text, b"\nWriteback:") * 1024)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)


class CgroupLimit:
    """What is left below the limit of one cgroup of version 1 or 2, with its page cache and half of what can be swapped out."""

    def __init__(self, directory: Path, is_v1: bool) -> None:
        self.directory = directory
        self.is_v1 = is_v1
        self.name = f"limit of cgroup {'v1' if is_v1 else 'v2'} {proctext.shown(directory.name)}"
        self._prefix = b"total_" if is_v1 else b""
        self._opened: list[int] = []
        try:
            self._limits = [self._open(name) for name in (("memory.limit_in_bytes",) if is_v1 else ("memory.max", "memory.high"))]
            self._usage = self._open("memory.usage_in_bytes" if is_v1 else "memory.current")
            self._stat = self._open("memory.stat")
        except BaseException:
            self.close()
            raise

    @property
    def limit(self) -> int:
        """Bytes; all of RAM where there is none."""
        texts = [os.pread(fd, 32, 0).strip() for fd in self._limits]
        return min([total_ram_bytes(), *(int(text) for text in texts if text != b"max")])

    def headroom(self) -> int:
        """Bytes."""
        stat = os.pread(self._stat, _READ_BYTES, 0)
        cache, anon = (
            sum(_field(stat, self._prefix + kind + page) for kind in (b"inactive_", b"active_")) for page in (b"file", b"anon")
        )
        return self.limit - int(os.pread(self._usage, 32, 0)) + cache + anon // 2

    def watch(self, headroom_bytes: int) -> int:
        """An eventfd that becomes readable whenever less than `headroom_bytes` are left (v1). Raises OSError."""
        event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            (self.directory / "cgroup.event_control").write_text(f"{event} {self._usage} {max(self.limit - headroom_bytes, 0)}")
        except OSError:
            os.close(event)
            raise
        return event

    def close(self) -> None:
        """Let go of the files."""
        for fd in self._opened:
            os.close(fd)

    def _open(self, name: str) -> int:
        fd = os.open(self.directory / name, os.O_RDONLY | os.O_CLOEXEC)
        self._opened.append(fd)
        return fd


class Stalls:
    """PSI: a descriptor that becomes readable when something stalls for memory. Raises OSError where there is none."""

    def __init__(self, file: Path = _PSI) -> None:
        self.file = file
        self._fd, self.trigger = _armed(file)
        try:
            self._poll = select.epoll()
            self._poll.register(self._fd, select.EPOLLPRI)
        except BaseException:  # its epoll is closed with the last reference
            os.close(self._fd)
            raise
        self.name = f"stalls ({file})"

    def fileno(self) -> int:
        """To wait for."""
        return self._poll.fileno()

    def clear(self) -> None:
        """Ready for the next one.

        A trigger is told once, and a poll that only asks takes it: so does the epoll of whoever waits for our descriptor. That this
        was readable is all there is to know. Source: kernel/sched/psi.c (psi_trigger_poll).
        """
        self._poll.poll(0)

    def total_us(self) -> int:
        """How long something has stalled since the boot."""
        text = os.pread(self._fd, _READ_BYTES, 0)
        at = text.index(b"total=") + 6
        return int(text[at : text.index(b"\n", at)])

    def close(self) -> None:
        """Disarm."""
        self._poll.close()
        os.close(self._fd)


class SignalsLost(Exception):
    """A signal has gone with the cgroup it was of: the process lives in another one now, whose signals are to be opened."""


class PressureSignals:
    """The signals that are live here, and why the others are not. What is read opens nothing and allocates little."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.available = Available()
        self.stalls: list[Stalls] = []
        self.limits: list[CgroupLimit] = []
        try:
            self.limits = _own_limits()
        except BaseException:
            self.close()
            raise
        for file in _stall_files(self.limits):
            try:
                self.stalls.append(Stalls(file))
            except OSError as error:
                self.missing.append(f"stalls ({file}: {error.strerror})")

    @property
    def memory_bytes(self) -> int:
        """The memory there is: RAM, or the least limit of a cgroup."""
        return min([total_ram_bytes(), *(limit.limit for limit in self.limits)])

    @property
    def live(self) -> list[str]:
        """Names."""
        names = [self.available.name, *(limit.name for limit in self.limits), *(stall.name for stall in self.stalls)]
        return ["swap-out stream", *names]

    def memory(self) -> Memory:
        """As it is now; `headroom` is the least of the system's and of every limit's. Raises SignalsLost."""
        found = self.available.memory()
        try:
            return found._replace(headroom=min([found.headroom, *(limit.headroom() for limit in self.limits)]))
        except (OSError, ValueError) as error:
            raise SignalsLost(f"a cgroup's limit cannot be read any more ({error})") from error

    def stalled_us(self) -> int:
        """How long something has stalled for memory, since the boot; of the cgroup's and the system's stalls the greater sum.

        Raises SignalsLost.
        """
        try:
            return max((stall.total_us() for stall in self.stalls), default=0)
        except (OSError, ValueError) as error:
            raise SignalsLost(f"a cgroup's stalls cannot be read any more ({error})") from error

    def close(self) -> None:
        """Let go of all."""
        self.available.close()
        for limit in self.limits:
            limit.close()
        for stall in self.stalls:
            stall.close()


def _own_limits() -> list[CgroupLimit]:
    """The cgroups that limit this process, its own first: those whose limit is less than RAM."""
    found: list[CgroupLimit] = []
    for controllers, path in proctext.parse_cgroups(Path("/proc/self/cgroup").read_bytes()):
        is_v1 = "memory" in controllers
        if is_v1 or not controllers:
            found += _limits_above((_V1 if is_v1 else _V2) / path.strip("/"), is_v1)
    return found


def _stall_files(limits: list[CgroupLimit]) -> list[Path]:
    """Where stalls are told: of the own cgroup (v2), and of the system."""
    return [limit.directory / "memory.pressure" for limit in limits if not limit.is_v1] + [_PSI]


def _limits_above(directory: Path, is_v1: bool) -> list[CgroupLimit]:
    """Of `directory` and those above it; a root has no limit."""
    found: list[CgroupLimit] = []
    root = _V1 if is_v1 else _V2
    while directory != root and directory.is_relative_to(root):
        with suppress(OSError, ValueError):
            found += _limit_at(directory, is_v1)
        directory = directory.parent
    return found


def _limit_at(directory: Path, is_v1: bool) -> list[CgroupLimit]:
    """The limit of `directory`, if it is one: less than RAM. Raises OSError, ValueError."""
    limit, is_one = CgroupLimit(directory, is_v1), False
    try:
        is_one = limit.limit < total_ram_bytes()
    finally:
        if not is_one:
            limit.close()
    return [limit] if is_one else []


def _armed(file: Path) -> tuple[int, str]:
    for trigger in _TRIGGERS:
        fd = os.open(file, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(fd, trigger.encode() + b"\0")
            return fd, trigger
        except OSError as error:
            os.close(fd)
            refused = error
    raise refused


def _kilobytes(meminfo: bytes, key: bytes) -> int:
    at = meminfo.index(key) + len(key)
    return int(meminfo[at : meminfo.index(b"kB", at)])


def _field(stat: bytes, key: bytes) -> int:
    at = stat.find(b"\n" + key + b" ")
    if at < 0:
        return 0
    start = at + len(key) + 2
    return int(stat[start : stat.index(b"\n", start)])
