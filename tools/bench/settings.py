"""Settings of the machine that a benchmark changes, restored at its end; after a crash, by the next benchmark.

Before the first change, a record of what is to be written back goes to /run, which a boot empties. A lock on the record says that
its benchmark lives. So a benchmark that finds a record without a lock knows that another one was killed, and restores what that one
left. Knows nothing of what the settings mean.

Invariants:
 1. Nothing is changed that is not in the record.
 2. The record is emptied only after everything in it has been restored.
 3. No signal interrupts the restoration.

Source: flock(2).
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from tmemfs.errors import Busy, Refused
from tools.interrupts import uninterrupted

RECORD: Final = Path("/run/tmemfs-bench-settings")
_MOST_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Change:
    """A file of the kernel, its value during the benchmark, and the value afterwards."""

    file: Path
    during: str
    after: str


class Settings:
    """The settings, from the view of one benchmark at a time. Raises Busy if another one lives."""

    def __init__(self, record: Path = RECORD) -> None:
        self._record = record
        self._fd = -1

    def __enter__(self) -> Settings:
        self._fd = self._locked()
        if left := self._recorded():
            self._restore(left)
            print(f"bench: restored what a benchmark that was killed has left: {_shown(left)}", file=sys.stderr)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with uninterrupted():
            try:
                self._restore(self._recorded())
                self._record.unlink()
            finally:
                os.close(self._fd)

    def change(self, changes: Sequence[Change]) -> None:
        """Record and make `changes`, in addition to those made before."""
        self._append([(os.fspath(one.file), one.after) for one in changes])
        for one in changes:
            one.file.write_text(one.during)

    def _locked(self) -> int:
        """A descriptor of the record, locked."""
        while True:
            fd = os.open(self._record, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(fd)
                raise Busy("another benchmark runs, and has changed settings of this machine: wait until it has ended") from None
            # a benchmark that ended since the open has removed the file that is locked now
            if self._record.exists() and os.path.samestat(os.fstat(fd), self._record.stat()):
                return fd
            os.close(fd)

    def _recorded(self) -> list[tuple[str, str]]:
        """File and value of all that is to be restored, the value that the machine had first."""
        found: dict[str, str] = {}
        for line in os.pread(self._fd, _MOST_BYTES, 0).splitlines(keepends=True):
            # a torn line is the last: its benchmark was killed before it made that change
            if line.endswith(b"\n"):
                name, value = json.loads(line)
                found.setdefault(name, value)
        return list(found.items())

    def _append(self, after: Sequence[tuple[str, str]]) -> None:
        text = b"".join(json.dumps(one).encode() + b"\n" for one in after)
        os.pwrite(self._fd, text, os.fstat(self._fd).st_size)
        os.fsync(self._fd)

    def _restore(self, after: Sequence[tuple[str, str]]) -> None:
        """Write everything back. Raises Refused with what could not be restored, which stays in the record."""
        failed = [(name, value) for name, value in reversed(after) if not _is_written(Path(name), value)]
        os.ftruncate(self._fd, 0)
        self._append(failed)
        if failed:
            raise Refused(f"could not be restored: {_shown(failed)}: write that yourself, and remove {self._record}")


def _is_written(file: Path, value: str) -> bool:
    try:
        file.write_text(value)
    except FileNotFoundError:
        # a cgroup or a device that is gone has no setting
        return True
    except OSError:
        return False
    return True


def _shown(after: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"'{value}' in {name}" for name, value in after)
