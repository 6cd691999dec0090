"""The blocks of a file: which are allocated. Writes keep that as it is, so that loads never wait for a write.

A file system locks a file alone (its inode) to allocate blocks or to punch a hole. Before it does, it waits for the direct writes
that are under way, and keeps every read away meanwhile: a load would wait for a write. So here a change waits first, without that
lock: it is made while no write is under way. Reads ask nobody.

Thread-safety: any thread. A thread that keeps the blocks must not change them.

Invariant: 1. No write is under way while blocks change, and one change is made at a time. A change goes before the writes that
come after it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Blocks:
    """Who may write to a file, and who may change which blocks are allocated."""

    def __init__(self) -> None:
        # guarded by the condition's lock
        self._ended = threading.Condition()
        self._writes = 0
        self._changes = 0
        self._is_changing = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """For a write: several at once."""
        with self._ended:
            self._ended.wait_for(lambda: not self._changes)
            self._writes += 1
        try:
            yield
        finally:
            with self._ended:
                self._writes -= 1
                self._ended.notify_all()

    @contextmanager
    def changed(self) -> Iterator[None]:
        """For a change: alone."""
        with self._ended:
            self._changes += 1
            self._ended.wait_for(lambda: not self._writes and not self._is_changing)
            self._is_changing = True
        try:
            yield
        finally:
            with self._ended:
                self._is_changing = False
                self._changes -= 1
                self._ended.notify_all()
