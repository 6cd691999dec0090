"""Memory cgroups that a swapoff would take above their limit.

The kernel charges each page to the cgroup that it was swapped out of, and kills processes there once the limit is reached. This
covers cgroup v1 and v2, wherever they are mounted. The figures of a cgroup include those of all cgroups below it. The swapped-out
pages of a cgroup may lie in any swap of the machine, so at most what is used of the one that is turned off counts. The page cache
does not count, since the kernel drops it first, and what does not fit may go to another swap. `memory.high` slows processes down
and kills none.

Sources: the kernel's admin-guide/cgroup-v1/memory.rst, admin-guide/cgroup-v2.rst, mm/swapfile.c (unuse_pte charges),
mm/memcontrol-v1.c (swapout moves a charge from memory to swap).
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
from tmemfs.system.swapdev import SWAP_IN_MARGIN
from tmemfs.units import MIB, format_size

#: Cgroups that the message names.
_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class Overfull:
    """A cgroup whose pages would be swapped in: `short_bytes` of them do not fit below its limit."""

    directory: Path
    limit_file: str
    limit_bytes: int
    used_bytes: int
    swapped_bytes: int

    @property
    def short_bytes(self) -> int:
        """The bytes above the limit."""
        return self.used_bytes + self.swapped_bytes - self.limit_bytes


def memory_roots(mounts: list[Mount]) -> list[tuple[Path, bool]]:
    """(directory, whether it is cgroup v1) of each hierarchy that may limit memory."""
    # by device: a hierarchy that is mounted twice counts once
    found: dict[int, tuple[Path, bool]] = {}
    for mount in mounts:
        if mount.kind == "cgroup2" or (mount.kind == "cgroup" and "memory" in mount.super_options):
            found.setdefault(mount.device, (Path(mount.mountpoint), mount.kind == "cgroup"))
    return list(found.values())


def overfull(root: Path, is_v1: bool, coming_bytes: int) -> list[Overfull]:
    """The cgroups below `root` that would be above their limit if `coming_bytes` were swapped in."""
    found = [cgroup for directory in _below(root) if (cgroup := _examined(directory, is_v1, coming_bytes))]
    return [cgroup for cgroup in found if cgroup.short_bytes > 0]


def refuse_if_overfull(mounts: list[Mount], coming_bytes: int, free_elsewhere_bytes: int) -> None:
    """Raise Refused if processes of a cgroup would be killed when `coming_bytes` are swapped in."""
    found = [cgroup for root, is_v1 in memory_roots(mounts) for cgroup in overfull(root, is_v1, coming_bytes)]
    found.sort(key=lambda cgroup: -cgroup.short_bytes)
    # at its limit, the kernel swaps out other pages of the cgroup, if there is another swap
    if _short_in_all(found) <= free_elsewhere_bytes:
        return
    shown = "; ".join(map(_described, found[:_SHOWN])) + (f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    worst = found[0]
    enough = -(-(worst.limit_bytes + int(worst.short_bytes * SWAP_IN_MARGIN)) // MIB) * MIB
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
    """Bytes that do not fit; bytes that are short both in a cgroup and in one above it count once."""
    directories = {cgroup.directory for cgroup in found}
    below, total = dict.fromkeys(directories, 0), 0
    # the deepest first: a cgroup has to know what is short below it
    for cgroup in sorted(found, key=lambda cgroup: -len(cgroup.directory.parts)):
        short = max(cgroup.short_bytes, below[cgroup.directory])
        above = next((parent for parent in cgroup.directory.parents if parent in directories), None)
        if above is None:
            total += short
        else:
            below[above] += short
    return total


def _below(root: Path) -> Iterator[Path]:
    """`root` and all cgroups below it. A hierarchy's own root has no limit, but that of a namespace may have one."""
    stack = [root]
    while stack:
        directory = stack.pop()
        yield directory
        # a cgroup may be removed meanwhile
        with suppress(OSError), os.scandir(directory) as entries:
            stack += [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]


def _examined(directory: Path, is_v1: bool, coming_bytes: int) -> Overfull | None:
    """None where there is no limit, or swap is not accounted for."""
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
    if not is_v1:  # a page in the swap cache is in both figures; cgroup v1 counts it in memory only
        swapped = max(swapped - stat.get("swapcached", 0), 0)
    swapped = min(swapped, coming_bytes)
    return Overfull(directory, names[0], int(limit), max(usage - droppable, 0), swapped) if swapped else None
