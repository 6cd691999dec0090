"""A worker: one thread that is there from the start, for what must go on when memory is short.

trio makes threads when they are needed and ends those that idle; making one takes memory, which may not be there just when some is
to be made. Calls are done in order of arrival. Knows nothing of what it calls.

Thread-safety: `run` and `close` from one trio run.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import trio

from tmemfs.host.memory import prepare_thread


class _Call:
    """What is to be done, and what came of it; `finish` is called in the worker's thread."""

    def __init__(self, function: Callable[[], object], finish: Callable[[], object]) -> None:
        self._function = function
        self._finish = finish
        self.error: BaseException | None = None

    def do(self) -> None:
        try:
            self._function()
        except BaseException as error:
            self.error = error
        self._finish()


class Worker:
    """A thread called `name`, started at once."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    async def run(self, function: Callable[[], object]) -> None:
        """Call `function` in the worker's thread; raises what it raises. Waits for it, cancelled or not, as trio's threads do."""
        await trio.lowlevel.checkpoint_if_cancelled()
        done, token = trio.Event(), trio.lowlevel.current_trio_token()
        call = _Call(function, lambda: token.run_sync_soon(done.set))
        self._calls.put(call)
        with trio.CancelScope(shield=True):
            await done.wait()
        if call.error is not None:
            raise call.error

    def close(self) -> None:
        """End the thread once it has done what it was asked."""
        self._calls.put(None)

    def _work(self) -> None:
        prepare_thread()
        while call := self._calls.get():
            call.do()
