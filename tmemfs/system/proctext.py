"""The only parser of what the kernel writes in /proc and /sys. Pure: bytes in, names and figures out.

A name in these texts is any bytes except NUL. It need not be UTF-8, and a form feed, a no-break space or U+2028 may be part of it.
So texts are read as bytes and split only at the ASCII characters that the kernel escapes in names; `str.splitlines` and `str.split`
split at many more. Names are decoded by `os.fsdecode`, so that the system accepts them unchanged.

Sources: proc(5), sysfs(5), the kernel's fs/seq_file.c (mangle_path), fs/proc_namespace.c, mm/swapfile.c, drivers/block/loop.c.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_OCTAL: Final = re.compile(rb"\\([0-3][0-7]{2})")
_DELETED: Final = b" (deleted)"


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/PID/mountinfo. `device` is the st_dev of its files; `root` is the part of it that is mounted."""

    device: int
    root: str
    mountpoint: str
    kind: str
    super_options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SwapEntry:
    """One line of /proc/swaps."""

    path: str
    size_bytes: int
    used_bytes: int
    priority: int


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """Of /proc/PID/stat: the letter of the state, the parent, and the start time in clock ticks since the boot."""

    state: str
    parent: int
    started: int


@dataclass(frozen=True, slots=True)
class Area:
    """One mapping of /proc/PID/smaps or maps; `anonymous_bytes` is None in maps."""

    start: int
    end: int
    permissions: str
    path: str
    anonymous_bytes: int | None = None


def lines(text: bytes) -> list[bytes]:
    """The lines of `text`, without their newlines."""
    found = text.split(b"\n")
    return found[:-1] if not found[-1] else found


def fields(line: bytes, at_most: int = 0) -> list[bytes]:
    """The fields that spaces and tabs separate; with `at_most`, the last of that many fields keeps its spaces."""
    return re.split(rb"[ \t]+", line.strip(b" \t"), maxsplit=at_most - 1 if at_most else 0) if line.strip(b" \t") else []


def name_of(field: bytes) -> str:
    """The name in a field, its octal escapes decoded."""
    return os.fsdecode(_OCTAL.sub(lambda found: bytes([int(found[1], 8)]), field))


def shown(name: str) -> str:
    """A name in printable ASCII, for messages of one line."""
    return ascii(name)[1:-1]


def word_of(text: bytes) -> str:
    """The single value of a file, in ASCII."""
    return text.strip(b" \t\n").decode("ascii", "backslashreplace")


def parse_mounts(text: bytes) -> list[Mount]:
    """Mounts, the lower ones first."""
    return [mount for mount in map(_mount, lines(text)) if mount is not None]


def _mount(line: bytes) -> Mount | None:
    """The mount in one line, None for a line that is not one."""
    found = line.split(b" ")
    try:
        # between the options of the mount and the type are any number of optional fields, which a '-' ends
        dash = found.index(b"-", 6)
        major, _, minor = found[2].partition(b":")
        device = os.makedev(int(major), int(minor))
        options = tuple(map(name_of, found[dash + 3].split(b",")))
        return Mount(device, name_of(found[3]), name_of(found[4]), name_of(found[dash + 1]), options)
    except (ValueError, IndexError):
        return None


def parse_swaps(text: bytes) -> list[SwapEntry]:
    """The swaps that are on."""
    # the first line is a heading
    rows = [found for found in map(fields, lines(text)[1:]) if len(found) == 5]
    return [SwapEntry(name_of(path), int(size) << 10, int(used) << 10, int(priority)) for path, _, size, used, priority in rows]


def parse_backing_file(text: bytes) -> str:
    """The path that a loop device is attached to."""
    # sysfs escapes nothing and adds one newline, so a newline at the end of the name itself is kept
    return os.fsdecode(text.removesuffix(b"\n").removesuffix(_DELETED))


def parse_cgroups(text: bytes) -> list[tuple[list[str], str]]:
    """Of /proc/PID/cgroup: the controllers of each hierarchy (none for cgroup v2), and the path in it."""
    parts = (line.split(b":", 2) for line in lines(text) if line.count(b":") >= 2)
    return [(name_of(controllers).split(",") if controllers else [], os.fsdecode(path)) for _, controllers, path in parts]


def parse_keyed(text: bytes, prefix: bytes = b"") -> dict[str, bytes]:
    """Values by key of the lines that begin with `prefix`."""
    # status and meminfo have a ':' after the key, memory.stat has none
    pairs = (fields(line, 2) for line in lines(text) if line.startswith(prefix))
    return {name_of(pair[0].removesuffix(b":")): pair[1] for pair in pairs if len(pair) == 2}


def kilobytes(value: bytes) -> int:
    """The bytes of a value like '12 kB'."""
    return int(fields(value)[0]) << 10


def parse_process(text: bytes) -> ProcessStat:
    """The figures of /proc/PID/stat."""
    # the command's name is in parentheses and may contain parentheses: the last one ends it
    after = fields(text.rpartition(b")")[2].replace(b"\n", b""))
    return ProcessStat(word_of(after[0]), int(after[1]), int(after[19]))


def parse_areas(text: bytes) -> Iterator[Area]:
    """The mappings of /proc/PID/smaps or maps."""
    area: Area | None = None
    for line in lines(text):
        found = fields(line, 6)
        if found and not found[0].endswith(b":"):
            if area:
                yield area
            start, _, end = found[0].partition(b"-")
            # only a newline is escaped here: a backslash stands for itself
            path = os.fsdecode(found[5].replace(b"\\012", b"\n")) if len(found) > 5 else ""
            area = Area(int(start, 16), int(end, 16), word_of(found[1]), path)
        elif area and found and found[0] == b"Anonymous:":
            area = Area(area.start, area.end, area.permissions, area.path, int(found[1]) << 10)
    if area:
        yield area
