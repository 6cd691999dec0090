"""Into the background: fork, and tell the process in front how it went.

The child detaches from the terminal, closes what it inherited, writes to a log, and reports through a pipe: 'ready', or the message
of the error that stopped it, which the parent raises as its own. Nothing is imported or started between the two forks.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from tmemfs.errors import Refused, TmemfsError
from tmemfs.system.ownership import open_log

_READY: Final = b"ready"
_STANDARD: Final = 3


def run_in_background(serve: Callable[[Callable[[], None]], None], log: Path) -> None:
    """Run `serve(ready)` in a process of its own; returns when that calls `ready`. Raises Refused with its error."""
    open_standard_descriptors()
    log_fd = open_log(log)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        _serve_detached(serve, log_fd, writer)
    os.close(writer)
    os.close(log_fd)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    if said != _READY:
        _remove_empty(log)
        raise Refused(os.fsdecode(said) or f"the daemon ended at once: see {log}")


def open_standard_descriptors() -> None:
    """Open those of 0, 1 and 2 that the caller closed: the next file that is opened would be taken for one of them."""
    while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) < _STANDARD:
        os.set_inheritable(fd, True)
    os.close(fd)
    if sys.stderr is None:  # what Python makes of a closed one
        sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace")


def close_inherited(*kept: int) -> None:
    """Close every descriptor but 0, 1, 2 and `kept`: a lock or a pipe of our caller must not be held for as long as we live."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd >= _STANDARD and fd not in kept:
            with suppress(OSError):  # that of the listing itself
                os.close(fd)


def _said_of(error: BaseException) -> str:
    if isinstance(error, TmemfsError):
        return str(error)
    if isinstance(error, OSError | MemoryError):
        return f"the kernel refused what the daemon needs ({error}): free memory or raise its limits; the log has more"
    if isinstance(error, ImportError):
        return f"a Python package is missing ({error}): run 'make setup', or pip install tmemfs"
    return f"bug in tmemfs ({error!r}): see the log and report it"


def _remove_empty(log: Path) -> None:
    """Remove a log in which nothing was written: what was refused leaves nothing behind."""
    with suppress(OSError):
        if not log.stat().st_size:
            log.unlink()


def _serve_detached(serve: Callable[[Callable[[], None]], None], log_fd: int, writer: int) -> None:
    """In the child: never returns."""
    status = 1
    try:
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for fd, target in ((null, 0), (log_fd, 1), (log_fd, 2)):
            os.dup2(fd, target)
        close_inherited(writer)

        def ready() -> None:
            os.write(writer, _READY)
            os.close(writer)

        serve(ready)
        status = 0
    except BaseException as error:
        if not isinstance(error, TmemfsError):
            traceback.print_exc()
        message = _said_of(error)
        try:
            os.write(writer, os.fsencode(message))
        except OSError:
            print(f"tmemfs: {message}", file=sys.stderr)
    finally:
        with suppress(Exception):  # nothing may lead back into what the process in front does
            sys.stderr.flush()
        os._exit(status)
