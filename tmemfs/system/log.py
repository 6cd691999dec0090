"""The daemon's log, written by a thread of its own while the swap is served.

The log may lie on a tmpfs whose pages are in our swap, or on a disk whose journal waits for memory. Whoever serves the swap and
waited for such a write would wait for itself: a guest stood still so, its free memory at the minimum watermark.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from tmemfs.errors import NO_THREADS, Refused
from tmemfs.system.memory import prepare_thread
from tmemfs.system.ownership import open_log

#: Messages that wait to be written, at most; further ones are counted and not kept.
MOST_WAITING: Final = 1000
_WRITTEN_S: Final = 5.0

_Messages = queue.SimpleQueue[logging.LogRecord | Path | None]

log = logging.getLogger(__name__)


class Log:
    """The log of a running daemon. Thread-safety: any thread; nobody waits for a file."""

    def __init__(self, messages: _Messages, path: Path | None) -> None:
        self._messages = messages
        self._path = path

    def reopen(self) -> None:
        """Write to the file of that name from now on: the old one may have been renamed. Nothing, if the log is no file of ours."""
        if self._path is not None:
            self._messages.put(self._path)


class _Queued(logging.Handler):
    """Hands messages on, as text, without waiting for anything."""

    def __init__(self, messages: _Messages) -> None:
        super().__init__()
        self._messages = messages
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self._messages.qsize() >= MOST_WAITING:
            self._lost += 1
            return
        try:
            record.msg, record.args = record.getMessage(), None
        except Exception:  # a message that is not one must not fail whoever logs it
            self.handleError(record)
            return
        if self._lost:
            record.msg += f" (and {self._lost} messages before this one were not kept)"
            self._lost = 0
        self._messages.put(record)


@contextmanager
def log_in_background(path: Path | None = None) -> Iterator[Log]:
    """What is logged meanwhile goes to the root logger's handlers in a thread of its own, which is waited for at the end.

    `path` is the file behind standard output and standard error, if there is one. Raises Refused where there can be no thread.
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
        writer.join(_WRITTEN_S)


def _write(messages: _Messages, handlers: list[logging.Handler]) -> None:
    with suppress(Exception):
        prepare_thread()
    while record := messages.get():
        try:
            if isinstance(record, Path):
                _reopen(record)
            else:
                for handler in handlers:
                    handler.handle(record)
        except Exception:  # a full disk must not end the thread: what comes later may be written again
            continue


def _reopen(path: Path) -> None:
    try:
        fd = open_log(path)
    except Refused as error:
        log.error("the log cannot be reopened (%s): the old file is still written to", error)
        return
    for standard in (1, 2):
        os.dup2(fd, standard)
    os.close(fd)
    log.info("the log was reopened")
