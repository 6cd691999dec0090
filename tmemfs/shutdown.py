"""Shutdown: SIGTERM, SIGINT and SIGQUIT unmount the file system, unless its image is in use.

While the image is in use as swap or by a loop device, the daemon says so and stays, for its end would lose the pages in it. SIGHUP
opens the log again. SIGUSR2 ends this worker, and not the daemon. Other signals do not end the daemon (system/posix_signals.py).
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import trio

from tmemfs.errors import Busy, TmemfsError
from tmemfs.jobs.executor import Executor
from tmemfs.system.log import Log
from tmemfs.system.notify import notify
from tmemfs.system.own_mount import loops_of_own, unmount_own
from tmemfs.system.posix_signals import LEAVE, REOPEN_LOG, SignalInbox

log = logging.getLogger(__name__)


class Shutdown:
    """Unmounts `mountpoint` of process `daemon` when `signals` say so; `executor` runs what may ask the daemon itself."""

    def __init__(self, mountpoint: Path, daemon: int, signals: SignalInbox, executor: Executor) -> None:
        self._mountpoint = mountpoint
        self._daemon = daemon
        self._signals = signals
        self._executor = executor
        self._is_draining = False
        #: Set once this worker is to end, with the file system mounted.
        self.leaving = trio.Event()

    def is_draining(self) -> bool:
        """Whether the file system is being unmounted."""
        return self._is_draining

    async def obey_signals(self, written: Log) -> None:
        """Do what signals ask for, until cancelled."""
        while True:
            number = await self._signals.receive()
            if number == REOPEN_LOG:
                written.reopen()
            elif number == LEAVE:
                self.leaving.set()
            else:
                await self._stop(number.name)

    async def _stop(self, name: str) -> None:
        """Unmount, if nobody uses the image; say why not otherwise."""
        try:
            await self._executor.run(partial(self._unmount_if_unused, name))
        except TmemfsError as error:  # the image is in use, or the kernel refuses the unmount: serve on
            self._is_draining = False
            log.error("%s: not stopping, %s", name, error)

    def _unmount_if_unused(self, name: str) -> None:
        """In a thread: what it reads of the machine may ask the daemon itself. Raises Busy."""
        devices = loops_of_own(self._mountpoint, self._daemon)
        if devices:
            raise Busy(f"{' '.join(devices)} uses the image: run 'tmemfs down {self._mountpoint}'")
        # Before the unmount, so that a reader of the state is told while it lasts.
        self._is_draining = True
        notify("STOPPING=1")
        try:
            unmount_own(self._mountpoint, self._daemon)
        except OSError as error:
            raise Busy(f"{self._mountpoint} ({error.strerror}): close what has files open there") from error
        log.info("%s: stopping", name)
