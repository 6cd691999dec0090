"""Forking: a worker's process, as its supervisor makes it, and how that says that its mount answers, and how it ended."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NoReturn

from tmemfs.errors import TmemfsError
from tmemfs.system.background import said_of
from tmemfs.worker import Announce, Left

#: The worker's exit code after an unmount, after an error, and after it was asked to leave.
UNMOUNTED: Final = 0
FAILED: Final = 1
LEFT: Final = 3
READY: Final = b"\0ready"
_LONGEST_MESSAGE: Final = 4096
#: Between two attempts to fork.
_PAUSE_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A worker: `ended` is readable when it has ended, `reader` when it has said READY, or why it failed."""

    pid: int
    ended: int
    reader: int

    def said(self) -> bytes:
        """What it says; it says one thing."""
        return os.read(self.reader, _LONGEST_MESSAGE)

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self.ended)
        os.close(self.reader)


def fork_worker(serve: Callable[[Announce], None], is_first: bool) -> WorkerProcess:
    """Fork a process that calls `serve`, and ends with one of the codes above. Raises OSError for the first one."""
    while True:
        try:
            return _try_fork(serve)
        except OSError:  # no memory, or no process is allowed: for the moment
            if is_first:
                raise
        time.sleep(_PAUSE_S)


def _try_fork(serve: Callable[[Announce], None]) -> WorkerProcess:
    with suppress(OSError):
        sys.stdout.flush()  # what is in the buffer would be written by both
    reader, writer = os.pipe()
    try:
        worker = os.fork()
        if not worker:
            os.close(reader)
            _become_worker(serve, writer)
        return WorkerProcess(worker, _watched(worker), reader)
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)


def _become_worker(serve: Callable[[Announce], None], writer: int) -> NoReturn:
    """In the forked process: serve, say how that went, and end."""
    code = FAILED

    def announce() -> None:
        os.write(writer, READY)
        os.close(writer)

    try:
        serve(announce)
        code = UNMOUNTED
    except Left:
        code = LEFT
    except BaseException as error:
        if not isinstance(error, TmemfsError):
            traceback.print_exc()
        with suppress(OSError):
            os.write(writer, os.fsencode(said_of(error)))
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _watched(worker: int) -> int:
    """A descriptor of the process, which must not live without one. Raises OSError."""
    try:
        return os.pidfd_open(worker)
    except OSError:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        raise
