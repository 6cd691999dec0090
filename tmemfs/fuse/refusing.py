"""Refusing: a mount that nobody can serve answers every request with EIO, so that no process waits for ever.

A refused write leaves the page in RAM, a refused read ends the process that needs the page. The regions are untouched meanwhile.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable, Sequence
from typing import Final

from tmemfs.fuse import wire
from tmemfs.fuse.kept_requests import KeptRequests
from tmemfs.fuse.mount import Device
from tmemfs.fuse.namespace import SWAP
from tmemfs.fuse.replies import GONE
from tmemfs.store.region import Region

_LOOK_MS: Final = 1000


class Refusing:
    """Answers the requests of `device` with errors, those too that workers have read and left in `requests`."""

    def __init__(self, device: Device, requests: Region) -> None:
        self._device = device
        self._requests = requests
        self._buffer = memoryview(bytearray(wire.IO_BYTES + wire.REQUEST_BYTES + 4096))

    def run(self, wakes: Sequence[int], woken: Callable[[], bool]) -> bool:
        """Answer until the unmount (True), or until `woken` says so (False), which is called when one of `wakes` is readable.

        It is also called now and then.
        """
        if self._device.resends:
            self._write(wire.RESEND)
        for request in KeptRequests(self._requests, not self._device.resends, SWAP).left_over():
            self._write(wire.error_reply(request.unique, errno.EIO))
        # A request may be interrupted after the poll, and `woken` must be called all the same.
        os.set_blocking(self._device.fd, False)
        poll = select.poll()
        poll.register(self._device.fd, select.POLLIN)
        for wake in wakes:
            poll.register(wake, select.POLLIN)
        while True:
            events = {fd for fd, _ in poll.poll(_LOOK_MS)}
            if events != {self._device.fd} and woken():
                os.set_blocking(self._device.fd, True)  # for the worker to come
                return False
            if self._device.fd in events and not self._answer_one():
                return True

    def _answer_one(self) -> bool:
        """Answer one request; whether the file system is still mounted."""
        try:
            os.readv(self._device.fd, [self._buffer])
        except OSError as error:
            return error.errno not in GONE
        _, opcode, unique, _ = wire.HEADER.unpack_from(self._buffer)
        if opcode in wire.RELEASES:
            self._write(wire.empty_reply(unique))
        elif opcode not in wire.NO_REPLY:
            self._write(wire.error_reply(unique, errno.EIO))
        return True

    def _write(self, reply: bytes) -> None:
        try:
            os.write(self._device.fd, reply)
        except OSError as error:
            if error.errno not in (*GONE, errno.ENOENT):
                raise
