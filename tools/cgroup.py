"""A memory cgroup for a hog, v1 or v2, whichever the machine has. Needs root."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

_V1: Final = Path("/sys/fs/cgroup/memory")
_V2: Final = Path("/sys/fs/cgroup")
_REMOVED_S: Final = 5.0


def memory_controller() -> str | None:
    """'v1', 'v2' or None: which memory controller can be used here."""
    if (_V1 / "memory.limit_in_bytes").exists():
        return "v1"
    controllers = _V2 / "cgroup.controllers"
    return "v2" if controllers.exists() and "memory" in controllers.read_text().split() else None


class MemoryCgroup:
    """A new cgroup with at most `limit_bytes` of RAM; swap is not limited. Removed at the end."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        version = memory_controller()
        if version is None:
            raise OSError("no memory controller: boot with cgroup_enable=memory")
        self._is_v1 = version == "v1"
        self.path = (_V1 if self._is_v1 else _V2) / f"tmemfs-{name}-{os.getpid()}"
        self._limit_bytes = limit_bytes

    def __enter__(self) -> MemoryCgroup:
        if not self._is_v1:
            (_V2 / "cgroup.subtree_control").write_text("+memory")
        self.path.mkdir()
        limit = "memory.limit_in_bytes" if self._is_v1 else "memory.max"
        try:
            (self.path / limit).write_text(str(self._limit_bytes))
        except BaseException:
            self.path.rmdir()
            raise
        return self

    @property
    def tasks(self) -> Path:
        """The file that takes process ids."""
        return self.path / ("tasks" if self._is_v1 else "cgroup.procs")

    def add(self, pid: int) -> None:
        """Move process `pid` into the cgroup."""
        self.tasks.write_text(str(pid))

    def reclaim(self) -> None:
        """Reclaim what is left: pages of processes that ended while their pages were being swapped out."""
        # less was left than is asked for
        with suppress(OSError):
            if self._is_v1:
                (self.path / "memory.force_empty").write_text("0")
            else:
                (self.path / "memory.reclaim").write_text(str(self._limit_bytes))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        deadline = time.monotonic() + _REMOVED_S
        while True:
            try:
                self.path.rmdir()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
