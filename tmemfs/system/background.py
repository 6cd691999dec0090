"""Run a daemon in the background, and report its start to the command in front.

The child detaches from the terminal, closes what it inherited, writes to a log, and reports through a pipe: 'ready', or the message
of the error that stopped it, which the parent raises as its own. Nothing is imported or started between the two forks.
"""

from __future__ import annotations

import errno
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
#: Descriptors below this are standard input, output and error.
_STANDARD: Final = 3


def run_in_background(serve: Callable[[Callable[[], None]], None], log: Path) -> None:
    """Run `serve(ready)` in a process of its own; returns when that calls `ready`. Raises Refused with its error."""
    open_standard_descriptors()
    # before the fork: a log that cannot be opened is reported by the command itself
    log_fd = open_log(log)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        # the second child is no leader of the session, so it can never get a terminal again
        if os.fork():
            os._exit(0)
        _serve_detached(serve, log_fd, writer)
    # the read below ends when the last writer has ended
    os.close(writer)
    os.close(log_fd)
    os.waitpid(child, 0)
    said = _read_message(reader)
    os.close(reader)
    if said != _READY:
        _remove_empty(log)
        raise Refused(os.fsdecode(said) or f"the daemon ended at once: see {log}")


def _read_message(reader: int) -> bytes:
    """What the daemon says: that it is ready, or why it has ended."""
    said = b""
    # not to the end of the file after `ready`: the daemon's worker has the pipe as well
    while said != _READY and (more := os.read(reader, 4096)):
        said += more
    return said


def open_standard_descriptors() -> None:
    """Open those of 0, 1 and 2 that the caller closed: otherwise the next file that is opened becomes one of them."""
    # open(2) returns the lowest free number, so the first one above 2 says that all three are open
    while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) < _STANDARD:
        os.set_inheritable(fd, True)
    os.close(fd)
    # Python sets it to None where descriptor 2 was closed at its start
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace")


def close_inherited(*kept: int) -> None:
    """Close every descriptor except 0, 1, 2 and `kept`, so that a lock or a pipe of the caller is not held by the daemon."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd >= _STANDARD and fd not in kept:
            # the descriptor of the listing itself is closed already
            with suppress(OSError):
                os.close(fd)


def said_of(error: BaseException) -> str:
    """What the command in front says of an error that ended the daemon."""
    if isinstance(error, TmemfsError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return f"not enough files can be opened ({error.strerror}): raise RLIMIT_NOFILE (ulimit -n 64)"
    if isinstance(error, OSError | MemoryError):
        return f"the kernel refused what the daemon needs ({error}): free memory or raise its limits; the log has more"
    if isinstance(error, ImportError):
        return f"a Python package is missing ({error}): run 'make setup', or pip install tmemfs"
    return f"bug in tmemfs ({error!r}): see the log and report it"


def _remove_empty(log: Path) -> None:
    """Remove an empty log, so that a refused start leaves nothing behind."""
    with suppress(OSError):
        if not log.stat().st_size:
            log.unlink()


def _serve_detached(serve: Callable[[Callable[[], None]], None], log_fd: int, writer: int) -> None:
    """In the child: never returns."""
    status = 1
    try:
        # the daemon must not keep the file system of its start from being unmounted
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
        message = said_of(error)
        # after `ready` the pipe is closed: then only the log learns of the error
        try:
            os.write(writer, os.fsencode(message))
        except OSError:
            print(f"tmemfs: {message}", file=sys.stderr)
    finally:
        # nothing may return into the code of the process in front
        with suppress(Exception):
            sys.stderr.flush()
        os._exit(status)
