"""An executor: threads that exist from the start, for what must go on when no thread can be created.

trio creates threads when they are needed and ends those that idle. Creating one takes memory, which may not be there just when some
is to be freed, and may be forbidden (pids.max, RLIMIT_NPROC). So everything that may block while the swap is served is called in an
executor, and `start` is called before the mount answers. An executor that was not started starts with its first call.

Calls are done in order of arrival. Knows nothing of what it calls.

Thread-safety: `run` from trio; `start` and `close` from any one thread. The threads do not keep the executor: they end when it is
closed or is no longer referred to.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Generic, TypeVar

import trio

from tmemfs.system.memory import prepare_thread

T = TypeVar("T")

#: Their threads write, release, merge and clean, and were seen to use 12 KiB of their stacks.
_STACK_BYTES: Final = 32 << 10


class _Call(Generic[T]):
    """What is to be done, and what came of it; `finish` is called in the executor's thread."""

    def __init__(self, function: Callable[[], T], finish: Callable[[], object]) -> None:
        self._function = function
        self._finish = finish
        self._result: T | None = None
        self._error: BaseException | None = None

    def do(self) -> None:
        """Call the function; never raises."""
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error
        with suppress(trio.RunFinishedError):  # the event loop that asked has ended; the thread must not
            self._finish()

    def result(self) -> T:
        """What the function returned; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]


_Calls = queue.SimpleQueue[_Call[object] | None]


class Executor:
    """`threads` threads called `name` that take calls from one queue."""

    def __init__(self, name: str, threads: int = 1) -> None:
        self._name = name
        self._count = threads
        self._calls: _Calls = queue.SimpleQueue()
        self._is_started = False
        # The threads refer to the queue only. So an executor that a test or a demonstration forgets ends them.
        self._end = weakref.finalize(self, _end, self._calls, threads)
        self._end.atexit = False

    def start(self) -> None:
        """Start the threads, if they are not there yet. Raises RuntimeError where the system allows no more threads."""
        if not self._is_started:
            for _ in range(self._count):
                threading.Thread(target=_work, args=(self._calls,), name=self._name, daemon=True).start()
            self._is_started = True

    async def run(self, function: Callable[[], T]) -> T:
        """Call `function` in one of the threads; returns or raises what it does.

        Waits for the function even if cancelled meanwhile, as trio's own threads do.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self.start()
        done, token = trio.Event(), trio.lowlevel.current_trio_token()
        call = _Call(function, lambda: token.run_sync_soon(done.set))
        self._calls.put(call)  # type: ignore[arg-type]
        # The function may hold a plan of the store: a caller that went on would see the plan ended by nobody.
        with trio.CancelScope(shield=True):
            await done.wait()
        return call.result()

    def close(self) -> None:
        """End the threads once they have done what they were asked."""
        self._end()


def _end(calls: _Calls, threads: int) -> None:
    for _ in range(threads):
        calls.put(None)


def _work(calls: _Calls) -> None:
    with suppress(Exception):  # a thread that could not be prepared takes calls all the same: nobody else does
        prepare_thread(_STACK_BYTES)
    while call := calls.get():
        call.do()
