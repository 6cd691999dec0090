"""Memory cgroups that a swapoff would overfill: the kernel charges each page to the cgroup that it was swapped out of, and kills
processes there once its limit is reached.

Versions 1 and 2, wherever they are mounted. A cgroup's figures include those of all below it. The swapped-out pages of a cgroup lie
in any of the machine's swaps, so at most what is used of the one that is turned off counts. What can be dropped (its page cache)
does not, and what does not fit may go to another swap. `memory.high` slows processes down and kills none.

Sources: the kernel's admin-guide/cgroup-v1/memory.rst, admin-guide/cgroup-v2.rst, mm/swapfile.c (unuse_pte charges).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tmemfs.errors import Refused
from tmemfs.system.proctext import Mount, parse_keyed, word_of
from tmemfs.units import MIB, format_size

_SHOWN: Final = 3
#: Page tables come back with the pages.
_MARGIN: Final = 1.05


@dataclass(frozen=True, slots=True)
class Overfull:
    """A cgroup that pages would come back to: `short_bytes` of them do not fit below its limit."""

    directory: Path
    limit_file: str
    limit_bytes: int
    used_bytes: int
    swapped_bytes: int

    @property
    def short_bytes(self) -> int:
        """What would be above the limit."""
        return self.used_bytes + self.swapped_bytes - self.limit_bytes


def memory_roots(mounts: list[Mount]) -> list[tuple[Path, bool]]:
    """(directory, whether it is of version 1) of each hierarchy that may limit memory, once each."""
    found: dict[int, tuple[Path, bool]] = {}
    for mount in mounts:
        if mount.kind == "cgroup2" or (mount.kind == "cgroup" and "memory" in mount.super_options):
            found.setdefault(mount.device, (Path(mount.mountpoint), mount.kind == "cgroup"))
    return list(found.values())


def overfull(root: Path, is_v1: bool, coming_bytes: int) -> list[Overfull]:
    """The cgroups below `root` that would be above their limit if `coming_bytes` of swap came back."""
    found = [cgroup for directory in _below(root) if (cgroup := _examined(directory, is_v1, coming_bytes))]
    return [cgroup for cgroup in found if cgroup.short_bytes > 0]


def refuse_if_overfull(mounts: list[Mount], coming_bytes: int, free_elsewhere_bytes: int) -> None:
    """Raise Refused if processes of a cgroup would be killed, should `coming_bytes` of swap come back."""
    found = [cgroup for root, is_v1 in memory_roots(mounts) for cgroup in overfull(root, is_v1, coming_bytes)]
    found.sort(key=lambda cgroup: -cgroup.short_bytes)
    # as its limit is reached, the kernel swaps out what else is in a cgroup, if there is another swap
    if _short_in_all(found) <= free_elsewhere_bytes:
        return
    shown = "; ".join(map(_described, found[:_SHOWN])) + (f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    worst = found[0]
    enough = -(-(worst.limit_bytes + int(worst.short_bytes * _MARGIN)) // MIB) * MIB
    raise Refused(
        f"the kernel would kill processes of memory cgroups whose pages do not fit below their limit: {shown}. "
        f"Raise the limit (echo {enough} > {worst.directory / worst.limit_file}) or end processes "
        "there first, or use --force"
    )


def _described(cgroup: Overfull) -> str:
    return (
        f"{cgroup.directory} ({format_size(cgroup.swapped_bytes)} swapped out, {format_size(cgroup.used_bytes)} in use, "
        f"limit {format_size(cgroup.limit_bytes)})"
    )


def _short_in_all(found: list[Overfull]) -> int:
    """Bytes that do not fit, those counted once that are short in a cgroup and in one above it."""
    directories = {cgroup.directory for cgroup in found}
    below, total = dict.fromkeys(directories, 0), 0
    for cgroup in sorted(found, key=lambda cgroup: -len(cgroup.directory.parts)):
        short = max(cgroup.short_bytes, below[cgroup.directory])
        above = next((parent for parent in cgroup.directory.parents if parent in directories), None)
        if above is None:
            total += short
        else:
            below[above] += short
    return total


def _below(root: Path) -> Iterator[Path]:
    """All cgroups below `root`: the root itself has no limit, but that of a namespace has."""
    stack = [root]
    while stack:
        directory = stack.pop()
        yield directory
        with suppress(OSError), os.scandir(directory) as entries:  # cgroups come and go
            stack += [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]


def _examined(directory: Path, is_v1: bool, coming_bytes: int) -> Overfull | None:
    """None where there is no limit, or no swap is accounted for."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if is_v1 else ("memory.max", "memory.current")
    prefix = "total_" if is_v1 else ""
    try:
        limit = word_of((directory / names[0]).read_bytes())
        if limit == "max":
            return None
        stat = {key: int(value) for key, value in parse_keyed((directory / "memory.stat").read_bytes()).items()}
        swapped = stat[f"{prefix}swap"] if is_v1 else int((directory / "memory.swap.current").read_bytes())
        usage = int((directory / names[1]).read_bytes())
    except (OSError, KeyError, ValueError):
        return None
    droppable = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("inactive", "active"))
    # a page in the swap cache is in memory already, and in swap still
    swapped = min(max(swapped - stat.get(f"{prefix}swapcached", 0), 0), coming_bytes)
    return Overfull(directory, names[0], int(limit), max(usage - droppable, 0), swapped) if swapped else None
