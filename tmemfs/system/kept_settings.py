"""Kept settings: what users have written to control files and was accepted, for the workers to come.

A worker starts from the options of the mount. What was changed since then is kept in this region, which the supervisor makes and
which outlives each worker. The next one writes it to its own control files before it serves.

    offset         size   content
    0              8      number of writes so far: the half in force is number % 2
    64             4032   first half: a JSON object of texts by name, in the order in which they were accepted, ended by NUL
    4096           4032   second half, likewise

A change is written to the half that is not in force, and then the number with one 8-byte store. So a worker that is killed
in the middle of a write leaves what was kept before.

Thread-safety: one thread writes. Knows nothing of what the settings mean.
"""

from __future__ import annotations

import json
import mmap
import os
from typing import Final

_HALVES: Final = (64, 4096)
_HALF_BYTES: Final = 4032
_REGION_BYTES: Final = 8192


class KeptSettings:
    """The region behind `fd`, mapped. Raises OSError."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.map = mmap.mmap(fd, _REGION_BYTES)
        self.map.madvise(mmap.MADV_DONTDUMP)
        self.size_bytes = _REGION_BYTES
        self._writes = memoryview(self.map)[:8].cast("Q")

    @classmethod
    def create(cls) -> KeptSettings:
        """A new region, in which nothing is kept."""
        fd = os.memfd_create("tmemfs-settings", os.MFD_CLOEXEC)
        os.ftruncate(fd, _REGION_BYTES)
        return cls(fd)

    def all(self) -> dict[str, str]:
        """The texts by name, in the order in which they were accepted."""
        at = _HALVES[self._writes[0] % 2]
        text = self.map[at : at + _HALF_BYTES].partition(b"\0")[0]
        return dict(json.loads(text)) if text else {}

    def keep(self, name: str, text: str) -> bool:
        """Keep `text` as the last one of `name`; whether there was space for it."""
        kept = self.all()
        kept.pop(name, None)  # what is accepted last comes last
        data = json.dumps({**kept, name: text}, separators=(",", ":")).encode()
        if len(data) >= _HALF_BYTES:
            return False
        at = _HALVES[(self._writes[0] + 1) % 2]
        self.map[at : at + _HALF_BYTES] = data.ljust(_HALF_BYTES, b"\0")
        self._writes[0] += 1
        return True

    def close(self) -> None:
        """Close the descriptor; what is mapped stays mapped."""
        os.close(self.fd)
