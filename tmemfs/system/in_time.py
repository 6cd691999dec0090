"""Answers in time: what a function returns, or nothing if that takes too long, as where a FUSE mount does not answer.

The function runs in a process of its own. A system call on a mount that hangs cannot be interrupted once its daemon has read the
request. A thread in such a call would keep this process from ending, a process is left behind and ends when it can.

Source: fs/fuse/dev.c (request_wait_answer).
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NoReturn, TypeVar

from tmemfs.errors import NoAnswer

#: A command that starts, asks once and gets no answer has said so within two seconds.
ANSWER_S: Final = 1.5
_PIECE_BYTES: Final = 1 << 16
_T = TypeVar("_T")


def in_time(ask: Callable[[], _T], seconds: float = ANSWER_S) -> _T:
    """What `ask` returns, which can be pickled, or what it raises; raises NoAnswer after `seconds`."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        os.close(reader)
        _answer(ask, writer)
    os.close(writer)
    answer = None
    try:
        answer = _all_of(reader, time.monotonic() + seconds)
    finally:
        os.close(reader)
        _end(process, waits=answer is not None)
    if answer is None:
        raise NoAnswer(f"there was no answer within {seconds:g} s")
    is_error, found = pickle.loads(answer)
    if is_error:
        raise found
    return found  # type: ignore[no-any-return]


def _answer(ask: Callable[[], _T], writer: int) -> NoReturn:
    """In the process of its own."""
    # A process that is left behind must hold nothing: neither the lock of the mount, nor the pipe that somebody reads to its end.
    os.closerange(3, writer)
    os.closerange(writer + 1, os.sysconf("SC_OPEN_MAX"))
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    try:
        _send(writer, (False, ask()))
    except BaseException as error:
        with suppress(BaseException):
            _send(writer, (True, error))
    os._exit(0)


def _send(writer: int, answer: tuple[bool, Any]) -> None:
    left = memoryview(pickle.dumps(answer))
    while left:
        left = left[os.write(writer, left) :]


def _all_of(reader: int, deadline: float) -> bytes | None:
    """What is written until the end of the file; None if that does not come by `deadline`."""
    found, poll = bytearray(), select.poll()
    poll.register(reader, select.POLLIN)
    while poll.poll(max(deadline - time.monotonic(), 0) * 1000):
        piece = os.read(reader, _PIECE_BYTES)
        if not piece:
            return bytes(found)
        found += piece
    return None


def _end(process: int, waits: bool) -> None:
    """End it, and wait for that only if it does not wait for anything itself."""
    with suppress(OSError):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0 if waits else os.WNOHANG)
