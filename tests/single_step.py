"""Single steps: runs a function in a child process by one machine instruction at a time, under ptrace(2), as a debugger does.

Between two steps the child might be killed. What it shares with its parent is then what it would have left.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import pytest

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long

_TRACEME: Final = 0
_SINGLESTEP: Final = 9
#: Exit status of a child that may not be traced.
_REFUSED: Final = 77


def single_step(prepare: Callable[[], Callable[[], object]], at_step: Callable[[], object]) -> int:
    """In a child, `prepare`, then run what that returns; here call `at_step` after each instruction. How many there were.

    The child is killed where it has done it, before its end. Skips the test where the system allows no tracing.
    """
    with _on_one_processor():
        child = os.fork()
        if not child:
            _run_traced(prepare)
        status = _wait(child)
        if os.WIFEXITED(status):
            pytest.skip("needs ptrace(2)") if os.WEXITSTATUS(status) == _REFUSED else pytest.fail("the child could not prepare")
        steps = 0
        while True:
            if _libc.ptrace(_SINGLESTEP, child, None, None):
                raise OSError(ctypes.get_errno(), "ptrace")
            status = _wait(child)
            assert os.WIFSTOPPED(status), f"the child has failed after {steps} instructions"
            if os.WSTOPSIG(status) == signal.SIGSTOP:
                os.kill(child, signal.SIGKILL)
                _wait(child)
                return steps
            steps += 1
            at_step()


def _run_traced(prepare: Callable[[], Callable[[], object]]) -> None:
    """In the child; never returns."""
    try:
        run = prepare()
        if _libc.ptrace(_TRACEME, 0, None, None):
            os._exit(_REFUSED)
        os.kill(os.getpid(), signal.SIGSTOP)
        run()
        os.kill(os.getpid(), signal.SIGSTOP)
    finally:
        os._exit(1)


def _wait(child: int) -> int:
    return os.waitpid(child, 0)[1]


@contextmanager
def _on_one_processor() -> Iterator[None]:
    """Parent and child take turns, so to wake another processor for each step would take most of the time."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
