"""The status region: what a supervisor and its worker say of themselves, for those who must not ask the mount.

It is a file in the runtime directory, mapped and locked by both. `tmemfs stat`, `doctor` and `down` read it, so they know of a
worker that is stopped, hangs or has ended. The supervisor learns from it whether the worker goes on.

    offset   size     content
    0        8 * 256  words of 64 bits (Word), and from HANDLING on one word per thread of the page path
    2048     64       version of tmemfs
    4096     16 * 256 the last deaths of workers, the newest at (deaths - 1) % 16: a line of text each, ended by NUL

Each word has one writer, and is written with one 8-byte store, so no reader sees half of one. A text may be seen half written.

Knows nothing of what the words mean to the one who acts on them.
"""

from __future__ import annotations

import mmap
import os
from enum import IntEnum
from pathlib import Path
from typing import Final

#: Of the region itself: another number, another layout.
FORMAT: Final = 0x31544D54
_WORDS_BYTES: Final = 2048
_VERSION_BYTES: Final = 64
_DEATHS_AT: Final = 4096
_DEATH_BYTES: Final = 256
_DEATHS_KEPT: Final = 16
_REGION_BYTES: Final = 8192
#: Threads of the page path, the leader first.
MOST_HANDLING: Final = 16


class Word(IntEnum):
    """Index of a word. The supervisor writes those below PULSE and the first WATCHDOG_MS, the worker writes the others."""

    FORMAT = 0
    #: A State.
    STATE = 1
    SUPERVISOR_PID = 2
    #: 0 while there is no worker.
    WORKER_PID = 3
    #: Workers started, this one included.
    GENERATION = 4
    #: Workers that ended otherwise than by an unmount, in all, and by cause.
    DEATHS = 5
    DEATHS_KILLED = 6
    DEATHS_CRASHED = 7
    DEATHS_HUNG = 8
    #: Handovers to another version.
    UPGRADES = 9
    #: CLOCK_MONOTONIC in ns, when the worker was started, and when it was last seen to answer requests or to have none.
    STARTED_NS = 10
    ANSWERED_NS = 11

    #: Grows once per second while the event loop runs.
    PULSE = 32
    #: 1 once the worker serves the mount.
    IS_SERVING = 33
    #: Requests for the image since the worker's start.
    REQUESTS = 34
    #: Calls of the tier that have begun, and that have ended.
    TIER_BEGUN = 35
    TIER_ENDED = 36
    #: Requests answered with an error because workers had died of them.
    POISONED = 37
    #: The store, as of the last pulse.
    POOL_BYTES = 38
    TIER_BYTES = 39
    PAGES_STORED = 40
    COMPRESSED_BYTES = 41
    #: How long requests may wait without an answer, in ms; 0: for ever.
    WATCHDOG_MS = 42


#: First of MOST_HANDLING words: the `unique` of the request that a thread of the page path handles now, or 0.
HANDLING: Final = 64


class State(IntEnum):
    """What the supervisor does."""

    STARTING = 0
    SERVING = 1
    #: Workers died too often: the mount answers errors.
    GAVE_UP = 2
    ENDED = 3
    UPGRADING = 4


class StatusRegion:
    """The region behind `fd`, mapped. Raises OSError."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.map = mmap.mmap(fd, _REGION_BYTES)
        self.size_bytes = _REGION_BYTES
        self._view = memoryview(self.map)
        self.words = self._view[:_WORDS_BYTES].cast("Q")

    @classmethod
    def create(cls, path: Path | None) -> StatusRegion:
        """A new region, in the file at `path`, or in memory that only descendants find. Raises OSError."""
        if path is None:
            fd = os.memfd_create("tmemfs-status", os.MFD_CLOEXEC)
        else:
            # A new file each time: a command may still read that of an earlier daemon.
            path.unlink(missing_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        os.ftruncate(fd, _REGION_BYTES)
        region = cls(fd)
        region.words[Word.FORMAT] = FORMAT
        return region

    @property
    def version(self) -> str:
        """Version of tmemfs that serves."""
        return self._text(_WORDS_BYTES, _VERSION_BYTES)

    def set_version(self, version: str) -> None:
        """Say that `version` serves."""
        self._set_text(_WORDS_BYTES, _VERSION_BYTES, version)

    def add_death(self, why: str) -> None:
        """Add a line to the last deaths, and count it."""
        deaths = self.words[Word.DEATHS]
        self._set_text(_DEATHS_AT + deaths % _DEATHS_KEPT * _DEATH_BYTES, _DEATH_BYTES, why)
        self.words[Word.DEATHS] = deaths + 1

    def deaths(self) -> list[str]:
        """The last deaths, the newest last."""
        count = self.words[Word.DEATHS]
        kept = range(max(count - _DEATHS_KEPT, 0), count)
        return [self._text(_DEATHS_AT + number % _DEATHS_KEPT * _DEATH_BYTES, _DEATH_BYTES) for number in kept]

    def handling(self) -> tuple[int, ...]:
        """The requests that threads of the page path handle now."""
        return tuple(self.words[HANDLING : HANDLING + MOST_HANDLING])

    def close(self) -> None:
        """Close the descriptor; the memory is unmapped once nothing borrows from it any more."""
        os.close(self.fd)

    def _text(self, at: int, length: int) -> str:
        return bytes(self._view[at : at + length]).partition(b"\0")[0].decode(errors="replace")

    def _set_text(self, at: int, length: int, text: str) -> None:
        self._view[at : at + length] = text.encode()[: length - 1].ljust(length, b"\0")
