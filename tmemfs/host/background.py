"""Into the background: fork, and tell the process in front how it went.

The child detaches from the terminal, writes to a log, and reports through a pipe: 'ready', or the message of the error that
stopped it, which the parent raises as its own. Nothing is imported or started between the two forks.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tmemfs.errors import Refused, TmemfsError
from tmemfs.host.log import open_log

_READY: Final = b"ready"


def run_in_background(serve: Callable[[Callable[[], None]], None], log: Path) -> None:
    """Run `serve(ready)` in a process of its own; returns when that calls `ready`. Raises Refused with its error."""
    try:
        log_fd = open_log(log)
    except OSError as error:
        raise Refused(f"cannot write the log {log} ({error.strerror}): give another --log") from error
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.close(reader)
        _serve_detached(serve, log_fd, writer)
    os.close(writer)
    os.close(log_fd)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    if said != _READY:
        raise Refused(said.decode() or f"the daemon ended at once: see {log}")


def _serve_detached(serve: Callable[[Callable[[], None]], None], log_fd: int, writer: int) -> None:
    """In the child: never returns."""
    status = 1
    try:
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for fd, target in ((null, 0), (log_fd, 1), (log_fd, 2)):
            os.dup2(fd, target)

        def ready() -> None:
            os.write(writer, _READY)
            os.close(writer)

        serve(ready)
        status = 0
    except BaseException as error:
        expected = isinstance(error, TmemfsError)
        if not expected:
            traceback.print_exc()
        message = str(error) if expected else f"bug in tmemfs ({error!r}): see the log and report it"
        try:
            os.write(writer, message.encode())
        except OSError:
            print(f"tmemfs: {message}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(status)
