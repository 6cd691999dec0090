"""Forking: a worker's process, as its supervisor makes it; how it is told to serve, says that its mount answers, and ends.

A process that has just been forked shares its memory with its parent. Each of the two needs memory for the first write to each
page, and after the death of a worker nobody serves the swap that memory would come from: in a guest without free memory both were
seen to wait for it for ever. So a worker is forked while the one before it serves, as a spare. It makes its own copy of what it
will write to, has stacks and heap faulted in, and waits to be told to serve.
"""

from __future__ import annotations

import os
import select
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
_LENGTH_BYTES: Final = 8
#: Between two attempts to fork.
_PAUSE_S: Final = 0.1


#: What a worker does before it is told to serve, and then: with what it is told, and what it calls once its mount answers.
Prepare = Callable[[], None]
Serve = Callable[[bytes, Announce], None]


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A worker: `ended` is readable when it has ended, `reader` when it has said READY, or why it failed."""

    pid: int
    ended: int
    reader: int
    writer: int

    def start(self, told: bytes) -> bool:
        """Have it serve; False if it has ended."""
        try:
            os.write(self.writer, len(told).to_bytes(_LENGTH_BYTES) + told)
        except BrokenPipeError:
            return False
        return not self.has_ended

    @property
    def has_ended(self) -> bool:
        """Whether it has ended."""
        poll = select.poll()
        poll.register(self.ended, select.POLLIN)
        return bool(poll.poll(0))

    def end(self) -> None:
        """Have it end, if it was not told to serve, and forget it."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self.close()

    def said(self) -> bytes:
        """What it says; it says one thing."""
        return os.read(self.reader, _LONGEST_MESSAGE)

    def close(self) -> None:
        """Close the descriptors."""
        for fd in (self.ended, self.reader, self.writer):
            os.close(fd)


def fork_worker(prepare: Prepare, serve: Serve, is_first: bool) -> WorkerProcess:
    """Fork a worker, which ends with one of the codes above. Raises OSError for the first one."""
    while True:
        try:
            return fork_spare(prepare, serve)
        except OSError:  # no memory, or no process is allowed: for the moment
            if is_first:
                raise
        time.sleep(_PAUSE_S)


def fork_spare(prepare: Prepare, serve: Serve) -> WorkerProcess:
    """As `fork_worker`, with one attempt. Raises OSError."""
    with suppress(OSError):
        sys.stdout.flush()  # what is in the buffer would be written by both
    said, told = os.pipe(), os.pipe()
    try:
        worker = os.fork()
        if not worker:
            os.close(said[0])
            os.close(told[1])
            _become_worker(prepare, serve, told[0], said[1])
        return WorkerProcess(worker, _watched(worker), said[0], told[1])
    except BaseException:
        os.close(said[0])
        os.close(told[1])
        raise
    finally:
        os.close(said[1])
        os.close(told[0])


def _become_worker(prepare: Prepare, serve: Serve, reader: int, writer: int) -> NoReturn:
    """In the forked process: prepare, serve when told to, say how that went, and end."""
    code = FAILED

    def announce() -> None:
        os.write(writer, READY)
        os.close(writer)

    try:
        prepare()
        told = _read_told(reader)
        serve(told, announce)
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


def _read_told(reader: int) -> bytes:
    """What the supervisor tells, once it does. Raises Left if it never will."""
    length = int.from_bytes(os.read(reader, _LENGTH_BYTES))
    told = b""
    while len(told) < length and (more := os.read(reader, length - len(told))):
        told += more
    os.close(reader)
    if not told:
        raise Left
    return told


def _watched(worker: int) -> int:
    """A descriptor of the process, which must not live without one. Raises OSError."""
    try:
        return os.pidfd_open(worker)
    except OSError:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        raise
