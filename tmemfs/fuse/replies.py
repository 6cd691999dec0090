"""Replies: what is written to /dev/fuse.

A reply is one write(2), so any thread may send one. The kernel finds the request by its `unique`.

Invariant: 1. `fail` answers its request, whatever is short at that moment: a request without an answer blocks its process for ever.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from typing import Final

from tmemfs.errors import TmemfsError
from tmemfs.fuse import wire
from tmemfs.fuse.bugs import Bugs
from tmemfs.fuse.errnos import errno_of
from tmemfs.fuse.kept_requests import KeptRequests

log = logging.getLogger(__name__)

#: The file system was unmounted, or the connection aborted.
GONE: Final = frozenset((errno.ENODEV, errno.EBADF, errno.ENOTCONN, errno.ECONNABORTED))
#: The pause after a failure that does not concern one request: a failure that lasts must not take a core.
PAUSE_S: Final = 0.01
#: Attempts to answer with an error, PAUSE_S apart.
_ATTEMPTS: Final = 100


class Replies:
    """Replies to the FUSE device `device_fd`; unknown errors are noted in `bugs`, `kept` is told what is answered."""

    def __init__(self, device_fd: int, bugs: Bugs, kept: KeptRequests) -> None:
        self._device = device_fd
        self._bugs = bugs
        self._kept = kept if kept.keeps else None

    def send(self, *parts: bytes | bytearray) -> None:
        """Send one reply, with one call."""
        kept = self._kept
        if kept is None:
            self._send(parts)
            return
        _, negative, unique = wire.REPLY.unpack_from(parts[0])
        kept.answering(unique, -negative)
        self._send(parts)
        kept.answered(unique)

    def _send(self, parts: tuple[bytes | bytearray, ...]) -> None:
        try:
            os.writev(self._device, parts)
        except OSError as error:
            self.note_refusal(error)

    def fail(self, unique: int, error: Exception) -> None:
        """Answer with the errno of `error`; an error that is not one of ours is a bug, and EIO. Never raises."""
        number = errno.EIO
        if isinstance(error, TmemfsError):
            number = errno_of(error)
        else:
            self._bugs.note(error)
        for _ in range(_ATTEMPTS):  # composing the reply takes a little memory, which may be missing for a moment
            try:
                self.send(wire.error_reply(unique, number))
                return
            except Exception as another:
                self._bugs.note(another)
                time.sleep(PAUSE_S)

    def note_refusal(self, error: OSError) -> None:
        """The kernel refused a reply with `error`: it gave the request up (ENOENT), or is gone, or we have a bug."""
        if error.errno not in GONE and error.errno != errno.ENOENT:
            log.error("bug in tmemfs, please report it: a reply was not taken: %s", error)
