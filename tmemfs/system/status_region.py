"""The status region: what a supervisor and its worker say of themselves, for those who must not ask the mount.

It is a file in the runtime directory, mapped and locked by both. `tmemfs stat`, `doctor` and `down` read it, so they know of a
worker that is stopped, hangs or has ended. The supervisor learns from it whether the worker goes on.

    offset   size     content
    0        8 * 256  words of 64 bits (Word), and from HANDLING on those of the page path
    2048     64       version of tmemfs
    4096     16 * 256 the last deaths of workers, the newest at (deaths - 1) % 16: a line of text each, ended by NUL

When a death was, and its cause, are words too: DIED_NS and DIED_BY, at the same place of each.

Each word has one writer, and is written with one 8-byte store, so no reader sees half of one. A text may be seen half written.
`read_status` is for those who only look.

Knows nothing of what the words mean to the one who acts on them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
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

    #: Grows every two seconds while the event loop runs.
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
    #: A spare worker that is ready, and needs no memory to take over; 0 while there is none.
    SPARE_PID = 44
    #: CLOCK_MONOTONIC in ns of the last pulse.
    PULSE_NS = 43


#: First of MOST_HANDLING words: the `unique` of the request that a thread of the page path handles now, or 0.
HANDLING: Final = 64
#: Behind them: 1 once the worker has answered a request of the page path.
HAS_ANSWERED: Final = HANDLING + MOST_HANDLING
#: First of the words that say when the last workers died (CLOCK_MONOTONIC in ns), and of those that say why (a Cause).
DIED_NS: Final = 96
DIED_BY: Final = 112


class State(IntEnum):
    """What the supervisor does."""

    STARTING = 0
    SERVING = 1
    #: Workers died too often: the mount answers errors.
    GAVE_UP = 2
    ENDED = 3
    UPGRADING = 4


class Cause(IntEnum):
    """Why a worker ended."""

    #: By SIGKILL from outside: an administrator, or the OOM killer.
    KILLED = 0
    #: By itself.
    CRASHED = 1
    #: By the watchdog.
    HUNG = 2

    @property
    def counter(self) -> Word:
        """The word that counts such deaths."""
        return _COUNTERS[self]


_COUNTERS: Final = {Cause.KILLED: Word.DEATHS_KILLED, Cause.CRASHED: Word.DEATHS_CRASHED, Cause.HUNG: Word.DEATHS_HUNG}


@dataclass(frozen=True, slots=True)
class Death:
    """The end of one worker: when (CLOCK_MONOTONIC in ns), why, and in words."""

    at_ns: int
    cause: Cause
    said: str


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

    def sign(self, supervisor: int, version: str) -> None:
        """Say that process `supervisor` has the mount, and which version it is."""
        self.words[Word.SUPERVISOR_PID] = supervisor
        self._set_text(_WORDS_BYTES, _VERSION_BYTES, version)

    def add_death(self, death: Death) -> None:
        """Add `death` to the last ones, and count it."""
        deaths = self.words[Word.DEATHS]
        place = deaths % _DEATHS_KEPT
        self._set_text(_DEATHS_AT + place * _DEATH_BYTES, _DEATH_BYTES, death.said)
        self.words[DIED_NS + place], self.words[DIED_BY + place] = death.at_ns, death.cause
        self.words[death.cause.counter] += 1
        self.words[Word.DEATHS] = deaths + 1

    def deaths(self) -> list[Death]:
        """The last deaths, the newest last."""
        return _deaths(self.words, self._view)

    def handling(self) -> tuple[int, ...]:
        """The requests that threads of the page path handle now."""
        return tuple(self.words[HANDLING : HANDLING + MOST_HANDLING])

    def close(self) -> None:
        """Close the descriptor; the memory is unmapped once nothing borrows from it any more."""
        os.close(self.fd)

    def _text(self, at: int, length: int) -> str:
        return _text(self._view, at, length)

    def _set_text(self, at: int, length: int, text: str) -> None:
        self._view[at : at + length] = text.encode()[: length - 1].ljust(length, b"\0")


@dataclass(frozen=True, slots=True)
class Status:
    """What a status region said when it was read: its words, the version that serves, and the last deaths of workers."""

    words: Sequence[int]
    version: str
    deaths: tuple[Death, ...]

    @property
    def state(self) -> int:
        """A State, unless another version wrote it."""
        return self.words[Word.STATE]

    @property
    def supervisor(self) -> int:
        """Its process."""
        return self.words[Word.SUPERVISOR_PID]

    @property
    def worker(self) -> int:
        """Its process, 0 while there is none."""
        return self.words[Word.WORKER_PID]

    @property
    def generation(self) -> int:
        """Workers started."""
        return self.words[Word.GENERATION]

    @property
    def watchdog_s(self) -> float:
        """How long requests may wait, 0 for ever."""
        return self.words[Word.WATCHDOG_MS] / 1000


def read_status(path: Path) -> Status | None:
    """What the region in the file at `path` says now; None if there is none, or one of another format. Raises OSError."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(raw) < _REGION_BYTES:
        return None
    view = memoryview(raw)
    words = view[:_WORDS_BYTES].cast("Q")
    if words[Word.FORMAT] != FORMAT:
        return None
    return Status(words, _text(view, _WORDS_BYTES, _VERSION_BYTES), tuple(_deaths(words, view)))


def _deaths(words: Sequence[int], view: memoryview) -> list[Death]:
    count = words[Word.DEATHS]
    places = [number % _DEATHS_KEPT for number in range(max(count - _DEATHS_KEPT, 0), count)]
    known = {int(cause) for cause in Cause}
    return [
        Death(
            words[DIED_NS + place],
            Cause(words[DIED_BY + place]) if words[DIED_BY + place] in known else Cause.CRASHED,
            _text(view, _DEATHS_AT + place * _DEATH_BYTES, _DEATH_BYTES),
        )
        for place in places
    ]


def _text(view: memoryview, at: int, length: int) -> str:
    return bytes(view[at : at + length]).partition(b"\0")[0].decode(errors="replace")
