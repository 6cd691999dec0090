"""What a run left behind on this machine: its swaps, loop devices, mounts, cgroups and processes, and changed kernel settings.

A run owns what is below its directory: a loop device over a file there and the swap on it, a mount there, a process with a path
there in its command line. It also owns the cgroups that its process made (tools/cgroup.py names them after it). What other runs own
is ignored. Kernel settings are compared only while no other tmemfs is mounted, since each of them changes some.

Reads /proc and /sys only. Texts of the kernel are bytes, since names need not be UTF-8.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: Settings of the kernel that a daemon changes while it runs.
SETTINGS: Final = ("vm/min_free_kbytes", "vm/watermark_boost_factor")
_CGROUPS: Final = ("fs/cgroup/memory", "fs/cgroup")
_POLL_S: Final = 0.1
_FS_TYPE: Final = b"fuse.tmemfs"


@dataclass(frozen=True, slots=True)
class Settings:
    """Kernel settings at one time, and whether another tmemfs may have changed them."""

    values: tuple[tuple[str, str], ...]
    are_shared: bool


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine from the view of a run below `directory`; `owner` is the process that makes its cgroups."""

    directory: Path
    owner: int
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")

    def settings(self) -> Settings:
        """The kernel settings of now."""
        values = [(name, (self.proc / "sys" / name).read_text().strip()) for name in SETTINGS]
        return Settings(tuple(values), any(kind == _FS_TYPE and not self._is_below(place) for place, kind in self._mounts()))

    def left(self, before: Settings) -> list[str]:
        """One line for each thing that is left."""
        loops = dict(self._loops())
        swaps = [name for name in self._swaps() if name in loops or self._is_below(name)]
        return [
            *(f"swap {_shown(name)} is on" for name in swaps),
            *(f"loop device {_shown(name)} is attached to {_shown(file)}" for name, file in loops.items()),
            *(f"{_shown(place)} is mounted" for place, _ in self._mounts() if self._is_below(place)),
            *(f"cgroup {path} is there" for path in self._cgroups()),
            *(f"process {pid} runs: {_shown(line)}" for pid, line in self._processes()),
            *self._changed(before),
        ]

    def wait(self, before: Settings, limit_s: float) -> list[str]:
        """What is left after `limit_s`, or earlier if nothing is: a daemon ends some time after its unmount."""
        deadline = time.monotonic() + limit_s
        while (left := self.left(before)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return left

    def _changed(self, before: Settings) -> list[str]:
        now = self.settings()
        if before.are_shared or now.are_shared:
            return []
        pairs = zip(before.values, now.values, strict=True)
        return [f"{name} is {value} and was {usual}" for (name, usual), (_, value) in pairs if value != usual]

    def _is_below(self, name: bytes) -> bool:
        place = os.fsencode(self.directory)
        return name == place or name.startswith(place + b"/")

    def _swaps(self) -> list[bytes]:
        return [_unescaped(line.split()[0]) for line in (self.proc / "swaps").read_bytes().split(b"\n")[1:] if line]

    def _loops(self) -> Iterator[tuple[bytes, bytes]]:
        """Device and file of each loop device that is attached to a file below our directory."""
        for backing in sorted((self.sys / "block").glob("loop*/loop/backing_file")):
            with suppress(OSError):  # detached meanwhile
                file = backing.read_bytes().rstrip(b"\n").removesuffix(b" (deleted)")
                if self._is_below(file):
                    yield b"/dev/" + os.fsencode(backing.parent.parent.name), file

    def _mounts(self) -> list[tuple[bytes, bytes]]:
        """Place and type of each mount."""
        rows = [line.split(b" ") for line in (self.proc / "self" / "mounts").read_bytes().split(b"\n") if line]
        return [(_unescaped(row[1]), row[2]) for row in rows]

    def _cgroups(self) -> list[Path]:
        parents = [self.sys / name for name in _CGROUPS]
        return [path for parent in parents for path in sorted(parent.glob(f"tmemfs-*-{self.owner}"))]

    def _processes(self) -> Iterator[tuple[int, bytes]]:
        """Processes with a path below our directory in their command line, except this one and its ancestors."""
        kin, place = self._kin(), re.compile(re.escape(os.fsencode(self.directory)) + b"(/|$)")
        for entry in sorted(self.proc.glob("[0-9]*")):
            with suppress(OSError):  # ended meanwhile
                words = (entry / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
                if int(entry.name) not in kin and any(map(place.search, words)):
                    yield int(entry.name), b" ".join(words)

    def _kin(self) -> set[int]:
        kin, pid = set[int](), os.getpid()
        while pid:
            kin.add(pid)
            try:
                pid = int((self.proc / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()[1])
            except OSError:
                break
        return kin


def _unescaped(name: bytes) -> bytes:
    """The name without the escapes that the kernel's tables use for characters that separate fields."""
    for code in (b"\\040", b"\\011", b"\\012", b"\\134"):
        name = name.replace(code, bytes([int(code[1:], 8)]))
    return name


def _shown(name: bytes) -> str:
    return ascii(os.fsdecode(name))[1:-1]
