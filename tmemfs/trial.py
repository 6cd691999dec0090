"""The trial: the first seconds of a supervisor that takes over, until it has shown that it serves.

Before it has passed, the supervisor that hands over can go on, so nothing is written that it would have to undo, and a failure ends
this process at once. When it has passed, the other one ends, and then the record, the status region and the command are told. Where
the other one was killed before, there is nobody to go back to, and the trial is over.
"""

from __future__ import annotations

import os
import select
import socket
from contextlib import suppress
from dataclasses import replace
from typing import Final

from tmemfs import __version__
from tmemfs.errors import Refused
from tmemfs.handover import SERVES, answer
from tmemfs.holdings import Holdings
from tmemfs.manifest import Manifest
from tmemfs.system import runtime
from tmemfs.system.runtime import MountRecord
from tmemfs.system.status_region import Word

#: The worker is watched for so long after it serves.
TRIAL_S: Final = 2.0
#: And then no request may have waited for longer than this while none was answered.
_SILENT_S: Final = 1.0


class Trial:
    """Of this process, which `manifest` was handed to. `channel` leads to the other supervisor, `asker` to the command."""

    def __init__(self, manifest: Manifest, holdings: Holdings, channel: socket.socket, asker: socket.socket) -> None:
        # constant after construction
        self._mountpoint = manifest.options.mountpoint
        self._holdings = holdings
        self._channel = channel
        self._asker = asker
        self.news = f"version {manifest.version} has handed over to {__version__}"
        self._serving_since: float | None = None
        #: The record of the mount, once it names this process.
        self.record: MountRecord | None = None
        self.is_passed = False

    def passes(self, is_serving: bool, silent_s: float, now: float) -> bool:
        """Whether the trial is over, and this process the supervisor; to be called now and then."""
        if is_serving and self._serving_since is None:
            self._serving_since = now
        has_served = self._serving_since is not None and now - self._serving_since >= TRIAL_S and silent_s <= _SILENT_S
        if not has_served and not self._is_alone():
            return False
        self._take_charge()
        return True

    def fail(self, reason: str) -> None:
        """Say why, and end this process, with nothing changed; returns where there is no other supervisor any more."""
        if not self._is_alone():
            with suppress(OSError):
                self._channel.send(reason.encode(errors="surrogateescape"))
            os._exit(1)
        self._take_charge()

    def _is_alone(self) -> bool:
        """Whether the other supervisor has ended, from which nothing else is to come."""
        channel = select.poll()
        channel.register(self._channel, select.POLLIN)
        return bool(channel.poll(0))

    def _take_charge(self) -> None:
        """Have the other supervisor end, and be the one."""
        # Until the other supervisor ends, its mapping keeps what the old worker has faulted in. If nothing can be mapped here, what
        # the workers map themselves has to do: no reason to fail.
        with suppress(OSError):
            self._holdings.regions.keep_used()
        with suppress(OSError):
            self._channel.send(SERVES)
        with suppress(OSError):
            self._channel.recv(1)  # until it has ended
        self.is_passed = True
        status = self._holdings.status
        status.sign(os.getpid(), __version__)
        status.words[Word.UPGRADES] += 1
        said = self._write_record()
        answer(self._asker, not said, said or self.news)
        self._channel.close()

    def _write_record(self) -> str:
        """Have the record of the mount name this process; why that failed, or nothing."""
        try:
            started, record = runtime.process_started(os.getpid()), runtime.read_record(self._mountpoint)
            if record is not None and started is not None:
                self.record = replace(record, pid=os.getpid(), started=started, version=__version__)
                runtime.write_record(self.record)
        except (OSError, Refused) as error:
            return f"{self.news}, but the record of the mount could not be written ({error}): process {os.getpid()} serves it"
        return ""
