"""Pages of running processes that the kernel could swap out, read through /proc. Needs root.

The page map shows which pages those are, not the map of areas: a page of a private mapping is anonymous unless bit 61 is set,
whether its area is a heap, a stack, or a file of which it is a modified copy (.data, relocated constants). Pages of shared memory
without a file on a disk (PostgreSQL's buffers, what Chromium's processes exchange) are counted too, as a kind of their own. Each
page of RAM counts once, even if many processes map it: pages that fork left shared, and shared memory, are recognized by their
frame number. Areas without any access are left out, since they are reservations of gigabytes, and so are swapped-out pages: reading
would swap them in.

The processes are stopped meanwhile (SIGSTOP), so that the pages that were found are the ones that are read. A page of zeros is RAM
like any other, except for the kernel's own zero page, which many addresses share and which counts once. Knows nothing of what the
programs are.

Source: Documentation/admin-guide/mm/pagemap.rst, Documentation/filesystems/proc.rst.
"""

from __future__ import annotations

import os
import signal
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final, Literal

from tmemfs.errors import Refused
from tmemfs.units import PAGE_BYTES
from tools.bench.accounts import parse_stat_parent

Kind = Literal["private", "shared"]

_PROC: Final = Path("/proc")
_PRESENT: Final = 1 << 63
_FILE_OR_SHARED: Final = 1 << 61
_FRAME: Final = (1 << 55) - 1
_ENTRY_BYTES: Final = 8
_ENTRIES_PER_READ: Final = 1 << 16
#: How names of shared mappings without a file on a disk begin.
_SHARED_MEMORY: Final = ("/dev/zero", "/memfd:", "/SYSV", "/dev/shm/", "[anon_shmem:")
#: Areas that the kernel maps, which are not the process's memory.
_KERNELS: Final = ("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]")


@dataclass(frozen=True, slots=True)
class Area:
    """Addresses [start, end) that a process may access."""

    start: int
    end: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Place:
    """Where a page was found; `frame` is its number in RAM, 0 if the kernel hides it."""

    pid: int
    address: int
    kind: Kind
    frame: int


@dataclass(frozen=True, slots=True)
class Capture:
    """A sample of all pages that were seen (of which `shared` are shared memory), in order of process and address."""

    seen: int
    shared: int
    pages: list[bytes]


def parse_maps(text: str) -> list[Area]:
    """The areas of /proc/PID/maps that may have anonymous pages."""
    areas = []
    for line in text.splitlines():
        addresses, access, _, _, _, *names = line.split(maxsplit=5)
        name = names[0] if names else ""
        if access.startswith("---") or name in _KERNELS or (access[3] == "s" and not name.startswith(_SHARED_MEMORY)):
            continue
        start, end = (int(part, 16) for part in addresses.split("-"))
        areas.append(Area(start, end, "shared" if access[3] == "s" else "private"))
    return areas


def parse_pagemap(entries: Iterable[int], first: int, kind: Kind) -> Iterator[tuple[int, int]]:
    """(address, frame) of each page in RAM that is anonymous, or of shared memory; `first` is the address of the first entry."""
    # all pages of a shared mapping have that bit
    without = _FILE_OR_SHARED if kind == "private" else 0
    for number, entry in enumerate(entries):
        if entry & _PRESENT and not entry & without:
            yield first + number * PAGE_BYTES, entry & _FRAME


def distinct(places: Iterable[Place]) -> list[Place]:
    """The places of distinct pages of RAM."""
    frames: set[int] = set()
    found = []
    for place in places:
        # 0 is an unknown frame, not a common one
        if place.frame not in frames:
            found.append(place)
            if place.frame:
                frames.add(place.frame)
    return found


def sample(total: int, most: int, seed: int) -> list[int]:
    """Up to `most` of range(total), in order: one from each of that many equal parts, the same for the same seed."""
    if total <= most:
        return list(range(total))
    random = Random(seed)
    return [random.randrange(part * total // most, (part + 1) * total // most) for part in range(most)]


def descendants(pid: int, parents: Mapping[int, int]) -> list[int]:
    """`pid` and all processes below it, from the parent of each process."""
    found = [pid]
    # the list grows while it is walked: each child is looked up in turn
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def family(pid: int) -> list[int]:
    """`pid` and all processes below it now."""
    return descendants(pid, dict(_parents()))


def capture(pid: int, most: int, seed: int = 1) -> Capture:
    """Up to `most` pages of `pid` and all processes below it. Raises Refused if there are none to read."""
    with _still(pid) as pids:
        places = distinct(place for one in pids for place in _places(one))
        chosen = [places[at] for at in sample(len(places), most, seed)]
        pages = [page for page in _read(chosen) if page is not None]
    if not pages:
        raise Refused(f"process {pid} has no page that can be read: it has ended, or this is not root (run it with sudo)")
    return Capture(len(places), sum(place.kind == "shared" for place in places), pages)


@contextmanager
def _still(pid: int) -> Iterator[list[int]]:
    """The processes, stopped until the end of the block."""
    stopped: list[int] = []
    try:
        # until no new one appears: a process may fork before it is stopped
        while new := [one for one in family(pid) if one not in stopped]:
            stopped += new
            for one in new:
                _signal(one, signal.SIGSTOP)
        yield stopped
    finally:
        for one in stopped:
            _signal(one, signal.SIGCONT)


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _parents() -> Iterator[tuple[int, int]]:
    for entry in _PROC.iterdir():
        if entry.name.isdecimal():
            # it may have ended
            with suppress(OSError):
                yield int(entry.name), parse_stat_parent((entry / "stat").read_text(errors="replace"))


def _places(pid: int) -> Iterator[Place]:
    """The pages of one process; none if it has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        areas = parse_maps((_PROC / str(pid) / "maps").read_text(errors="replace"))
        with open(_PROC / str(pid) / "pagemap", "rb", buffering=0) as pagemap:
            for area in areas:
                for first, entries in _entries(pagemap.fileno(), area):
                    for address, frame in parse_pagemap(entries, first, area.kind):
                        yield Place(pid, address, area.kind, frame)


def _entries(fd: int, area: Area) -> Iterator[tuple[int, array[int]]]:
    """(address, entries) for one part of an area after the other, without empty parts."""
    for first in range(area.start, area.end, _ENTRIES_PER_READ * PAGE_BYTES):
        count = min(_ENTRIES_PER_READ, (area.end - first) // PAGE_BYTES)
        data = os.pread(fd, count * _ENTRY_BYTES, first // PAGE_BYTES * _ENTRY_BYTES)
        # most of a reservation has no page: it is skipped before it becomes numbers
        if data.count(0) < len(data):
            yield first, array("Q", data)


def _read(places: list[Place]) -> Iterator[bytes | None]:
    """The pages in order; None for one that is gone or cannot be read."""
    files: dict[int, int] = {}
    try:
        for place in places:
            if place.pid not in files:
                files[place.pid] = os.open(_PROC / str(place.pid) / "mem", os.O_RDONLY)
            yield _page(files[place.pid], place.address)
    finally:
        for fd in files.values():
            os.close(fd)


def _page(fd: int, address: int) -> bytes | None:
    try:
        page = os.pread(fd, PAGE_BYTES, address)
    except OSError:
        return None
    return page if len(page) == PAGE_BYTES else None
