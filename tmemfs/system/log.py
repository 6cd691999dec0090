"""The daemon's log, which a thread of its own writes while the swap is served.

The log may lie on a tmpfs whose pages are in our swap, or on a disk whose journal waits for memory. A thread that serves the swap
and waits for such a write waits for itself: that deadlock was seen in a guest with its free memory at the minimum watermark.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

from tmemfs.errors import NO_THREADS, Refused
from tmemfs.system.memory import prepare_thread
from tmemfs.system.ownership import open_log

#: At most this many messages wait to be written. More are counted and dropped.
MOST_WAITING: Final = 1000
#: At its end the daemon waits for the last messages this long.
_WRITTEN_S: Final = 5.0

_Messages = queue.SimpleQueue[logging.LogRecord | Callable[[], None] | None]

log = logging.getLogger(__name__)


def configure() -> None:
    """Have messages go to standard error, with their time."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)


class Log:
    """The log of a running daemon. Thread-safety: any thread may call it; none waits for a file."""

    def __init__(self, messages: _Messages, path: Path | None) -> None:
        self._messages = messages
        self._path = path

    def reopen(self) -> None:
        """Write to a new file of the same name from now on: logrotate renames the old one. Does nothing if the log is no file."""
        if self._path is not None:
            self._messages.put(partial(_reopen, self._path))

    def follow(self) -> None:
        """Write to the file of that name, if it is another one by now: the process that forked this one does not know."""
        self._messages.put(partial(follow, self._path))


class _Queued(logging.Handler):
    """Queues messages as text, without waiting for anything."""

    def __init__(self, messages: _Messages) -> None:
        super().__init__()
        self._messages = messages
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self._messages.qsize() >= MOST_WAITING:
            self._lost += 1
            return
        # as text at once: by the time it is written, its arguments may have changed
        try:
            record.msg, record.args = record.getMessage(), None
        except Exception:
            # a malformed message must not become an error of the page path
            self.handleError(record)
            return
        if self._lost:
            record.msg += f" (and {self._lost} messages before this one were not kept)"
            self._lost = 0
        self._messages.put(record)


@contextmanager
def log_in_background(path: Path | None = None) -> Iterator[Log]:
    """Have a thread of its own pass what is logged to the root logger's handlers; the end of the block waits for it.

    `path` is the file behind standard output and standard error, if there is one. Raises Refused if no thread can be started.
    """
    root, messages = logging.getLogger(), _Messages()
    handlers = root.handlers
    writer = threading.Thread(target=_write, args=(messages, handlers), name="log", daemon=True)
    try:
        writer.start()
    except RuntimeError as error:
        raise Refused(NO_THREADS.format(error)) from error
    root.handlers = [_Queued(messages)]
    try:
        yield Log(messages, path)
    finally:
        root.handlers = handlers
        messages.put(None)
        # not for ever: the file may be on a disk that hangs
        writer.join(_WRITTEN_S)


def _write(messages: _Messages, handlers: list[logging.Handler]) -> None:
    with suppress(Exception):
        prepare_thread()
    while record := messages.get():
        try:
            if not isinstance(record, logging.LogRecord):
                record()
                continue
            for handler in handlers:
                handler.handle(record)
        except Exception:
            # a full disk must not end the thread: later messages may be written again
            continue


def follow(path: Path | None) -> None:
    """Write to the file at `path`, if that is not the one behind standard output: it was renamed since, and another one opened."""
    if path is None:
        return
    with suppress(OSError):
        if not os.path.samestat(path.stat(), os.fstat(1)):
            _reopen(path)


def _reopen(path: Path) -> None:
    try:
        fd = open_log(path)
    except Refused as error:
        log.error("the log cannot be reopened (%s): the old file is still written to", error)
        return
    # over the descriptors, so that what Python or a library prints follows too
    for standard in (1, 2):
        os.dup2(fd, standard)
    os.close(fd)
    log.info("the log was reopened")
