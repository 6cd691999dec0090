"""Signals of memory pressure: available memory, what is left below the limits of cgroups, stalls (PSI), thresholds (cgroup v1).

Any of them may be missing; the reason is kept, and the others work. Descriptors are opened once, before there is pressure, and
reading them needs almost no memory. Sources: proc(5), the kernel's accounting/psi, admin-guide/cgroup-v2 and cgroup-v1/memory.
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
#: Larger than /proc/meminfo and memory.stat.
_READ_BYTES: Final = 8192
#: 'some STALL_US WINDOW_US': fires after that much stall within the window. Unprivileged users may only have whole 2 s windows.
_TRIGGERS: Final = ("some 20000 500000", "some 50000 2000000")


class Memory(NamedTuple):
    """Figures in bytes. `headroom` is what programs can still get, in the system or below the limit of a cgroup.

    `available` is what they can get at once, without swapping; `under_write_back` is being written to a disk or to swap. Both are
    of the whole system.
    """

    headroom: int
    available: int
    under_write_back: int


class Available:
    """The memory available in the system: MemAvailable, and half of what can be swapped out and has a slot in swap."""

    name = "available memory"

    def __init__(self) -> None:
        self._fd = os.open(_MEMINFO, os.O_RDONLY | os.O_CLOEXEC)

    def memory(self) -> Memory:
        """The figures of now; `headroom` is that of the system."""
        text = os.pread(self._fd, _READ_BYTES, 0)
        anon = _kilobytes(text, b"\nActive(anon):") + _kilobytes(text, b"\nInactive(anon):")
        available = _kilobytes(text, b"\nMemAvailable:")
        # half: a swapped-out page still takes RAM in the pool, compressed, until it is written back
        headroom = available + min(anon, _kilobytes(text, b"\nSwapFree:")) // 2
        return Memory(headroom * 1024, available * 1024, _kilobytes(text, b"\nWriteback:") * 1024)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class CgroupLimit:
    """What is left below the limit of a cgroup (v1 or v2), including its page cache and half of what can be swapped out."""

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
        """The limit in bytes; all of RAM where there is none."""
        texts = [os.pread(fd, 32, 0).strip() for fd in self._limits]
        return min([total_ram_bytes(), *(int(text) for text in texts if text != b"max")])

    def headroom(self) -> int:
        """The bytes left below the limit."""
        stat = os.pread(self._stat, _READ_BYTES, 0)
        cache, anon = (
            sum(_field(stat, self._prefix + kind + page) for kind in (b"inactive_", b"active_")) for page in (b"file", b"anon")
        )
        return self.limit - int(os.pread(self._usage, 32, 0)) + cache + anon // 2

    def watch(self, headroom_bytes: int) -> int:
        """An eventfd that becomes readable when less than `headroom_bytes` are left (v1). Raises OSError."""
        # the kernel fires when usage crosses the threshold, so it is given as a usage
        event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            (self.directory / "cgroup.event_control").write_text(f"{event} {self._usage} {max(self.limit - headroom_bytes, 0)}")
        except OSError:
            os.close(event)
            raise
        return event

    def close(self) -> None:
        """Close the files."""
        for fd in self._opened:
            os.close(fd)

    def _open(self, name: str) -> int:
        fd = os.open(self.directory / name, os.O_RDONLY | os.O_CLOEXEC)
        self._opened.append(fd)
        return fd


class Stalls:
    """PSI: a descriptor that becomes readable when a task stalls for memory. Raises OSError where there is no PSI."""

    def __init__(self, file: Path = _PSI) -> None:
        self.file = file
        self._fd, self.trigger = _armed(file)
        try:
            self._poll = select.epoll()
            self._poll.register(self._fd, select.EPOLLPRI)
        except BaseException:
            # the epoll, if there is one, is closed with its last reference
            os.close(self._fd)
            raise
        self.name = f"stalls ({file})"

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._poll.fileno()

    def clear(self) -> None:
        """Reset the descriptor for the next stall.

        The kernel reports a trigger once, to the first poll. The epoll of the task that waits for our descriptor is one, so nothing
        more can be read here: that the descriptor was readable is all. Source: kernel/sched/psi.c (psi_trigger_poll).
        """
        self._poll.poll(0)

    def total_us(self) -> int:
        """How long tasks have stalled since the boot, in microseconds."""
        text = os.pread(self._fd, _READ_BYTES, 0)
        at = text.index(b"total=") + 6
        return int(text[at : text.index(b"\n", at)])

    def close(self) -> None:
        """Remove the trigger."""
        self._poll.close()
        os.close(self._fd)


class SignalsLost(Exception):
    """The cgroup of a signal was removed: the process is in another one, whose signals have to be opened."""


class PressureSignals:
    """The signals that work on this machine, and why the others do not. Reading opens nothing and allocates little."""

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
        # a kernel without PSI, or a container that may not set triggers: the figures of /proc/meminfo are enough to go on
        for file in _stall_files(self.limits):
            try:
                self.stalls.append(Stalls(file))
            except OSError as error:
                self.missing.append(f"stalls ({file}: {error.strerror})")

    @property
    def memory_bytes(self) -> int:
        """RAM, or the least limit of a cgroup."""
        return min([total_ram_bytes(), *(limit.limit for limit in self.limits)])

    @property
    def live(self) -> list[str]:
        """The names of the signals that work."""
        names = [self.available.name, *(limit.name for limit in self.limits), *(stall.name for stall in self.stalls)]
        return ["swap-out stream", *names]

    def memory(self) -> Memory:
        """The figures of now; `headroom` is the least of the system and of every limit. Raises SignalsLost."""
        found = self.available.memory()
        try:
            return found._replace(headroom=min([found.headroom, *(limit.headroom() for limit in self.limits)]))
        except (OSError, ValueError) as error:
            raise SignalsLost(f"a cgroup's limit cannot be read any more ({error})") from error

    def stalled_us(self) -> int:
        """How long tasks have stalled for memory since the boot: the sum of the system or of a cgroup, whichever is greater.

        Raises SignalsLost.
        """
        try:
            return max((stall.total_us() for stall in self.stalls), default=0)
        except (OSError, ValueError) as error:
            raise SignalsLost(f"a cgroup's stalls cannot be read any more ({error})") from error

    def close(self) -> None:
        """Close all files."""
        self.available.close()
        for limit in self.limits:
            limit.close()
        for stall in self.stalls:
            stall.close()


def _own_limits() -> list[CgroupLimit]:
    """The cgroups whose limit is less than RAM and holds for this process, its own first."""
    found: list[CgroupLimit] = []
    for controllers, path in proctext.parse_cgroups(Path("/proc/self/cgroup").read_bytes()):
        is_v1 = "memory" in controllers
        if is_v1 or not controllers:
            found += _limits_above((_V1 if is_v1 else _V2) / path.strip("/"), is_v1)
    return found


def _stall_files(limits: list[CgroupLimit]) -> list[Path]:
    """The files of stalls: of the limiting cgroups (v2), and of the system."""
    # cgroup v1 has no PSI
    return [limit.directory / "memory.pressure" for limit in limits if not limit.is_v1] + [_PSI]


def _limits_above(directory: Path, is_v1: bool) -> list[CgroupLimit]:
    """The limits of `directory` and of the cgroups above it."""
    found: list[CgroupLimit] = []
    root = _V1 if is_v1 else _V2
    # the root of a hierarchy has no limit
    while directory != root and directory.is_relative_to(root):
        with suppress(OSError, ValueError):
            found += _limit_at(directory, is_v1)
        directory = directory.parent
    return found


def _limit_at(directory: Path, is_v1: bool) -> list[CgroupLimit]:
    """The limit of `directory`, if it is less than RAM. Raises OSError, ValueError."""
    limit, is_one = CgroupLimit(directory, is_v1), False
    try:
        is_one = limit.limit < total_ram_bytes()
    finally:
        if not is_one:
            limit.close()
    return [limit] if is_one else []


def _armed(file: Path) -> tuple[int, str]:
    """A descriptor of `file` with a trigger set, and that trigger. Raises OSError."""
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
    # by hand instead of proctext: this runs at every sample, and needs four of fifty lines
    at = meminfo.index(key) + len(key)
    return int(meminfo[at : meminfo.index(b"kB", at)])


def _field(stat: bytes, key: bytes) -> int:
    at = stat.find(b"\n" + key + b" ")
    # the keys differ between kernel versions: one that is missing counts nothing
    if at < 0:
        return 0
    start = at + len(key) + 2
    return int(stat[start : stat.index(b"\n", start)])
