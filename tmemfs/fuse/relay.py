"""The relay: answers the swap image's pages itself and hands everything else to pyfuse3.

    kernel <-> /dev/fuse <-> the leader --READ, WRITE, FALLOCATE of the image--> pager          page_path.py
                                |  |`-- loads from a tier, long discards --> /dev/fuse          leader_followers.py
                                |  `--- stores that wait --> thread `stores` --> /dev/fuse
                                `------ all other requests --> thread `forwards` --> pyfuse3    namespace_link.py
                                              /dev/fuse <-- thread `replies` <---------'

This file has the threads and their end. The way of a request from `lead` to its reply is in page_path.py.

Thread-safety: `start`, `join`, `close` and `statistics` from any one thread. Everything else is constant after construction
or belongs to one thread.

Invariants, beside those of page_path.py:
1. No exception ends one of the threads: a request that failed is answered with an error, and the next one is read. Only an
   unmounted or aborted connection ends them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import trio

from tmemfs.fuse.bugs import Bugs
from tmemfs.fuse.interrupts import Interrupts
from tmemfs.fuse.mount import Device
from tmemfs.fuse.namespace_link import NamespaceLink
from tmemfs.fuse.page_path import READERS, Inheritance, PageCounts, PagePath
from tmemfs.fuse.replies import PAUSE_S, Replies
from tmemfs.jobs.latency import Latency
from tmemfs.pages.pager import Pager
from tmemfs.policy.bursts import STORE_WEIGHT
from tmemfs.system.memory import prepare_thread


class Relay:
    """Serves `pager` on the FUSE device `device`, beginning with what earlier workers left; `swap_inode` is the image's.

    `namespace_fd` is for pyfuse3, which closes it; `interrupts` is told of the writes that pyfuse3 gets, `latency`
    of requests of the image.
    """

    def __init__(
        self,
        device: Device,
        pager: Pager,
        swap_inode: int,
        inheritance: Inheritance,
        interrupts: Interrupts | None = None,
        latency: Latency | None = None,
    ) -> None:
        self._pager = pager
        self._handling = inheritance.handling
        self._bugs = Bugs()
        self._counts = counts = PageCounts()
        replies = Replies(device.fd, self._bugs, inheritance.kept)
        self._link = NamespaceLink(replies, interrupts or Interrupts(), lambda: counts.requests, self._bugs, device.init)
        latency = latency or Latency("off")
        self.pages = PagePath(device.fd, pager, swap_inode, inheritance, self._link, replies, counts, self._bugs, latency)
        self.namespace_fd = self._link.fd
        self.fail_forwarded = self._link.fail_forwarded
        self._ended = os.eventfd(0, os.EFD_CLOEXEC)
        self._is_over = False
        self._threads = [
            threading.Thread(target=self._run_prepared, args=(self._link.return_replies,), name="replies", daemon=True),
            threading.Thread(target=self._run_prepared, args=(self._link.send_forwards,), name="forwards", daemon=True),
            threading.Thread(target=self._run_prepared, args=(self.pages.followers.watch,), name="watch", daemon=True),
            threading.Thread(target=self._run_warmed, args=(self.pages.finish_stores, 1), name="stores", daemon=True),
            *(
                threading.Thread(target=self._run_warmed, args=(self._serve_pages, 2 + n), name=f"page-path-{n}", daemon=True)
                for n in range(READERS + 1)
            ),
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def wait_answering(self) -> bool:
        """Wait until the mount answers, namespace and all; False if it was unmounted before."""
        self._link.answers.wait()
        return not self._is_over

    async def wait_ended(self) -> None:
        """Return once the file system is unmounted."""
        await trio.lowlevel.wait_readable(self._ended)

    def join(self, timeout_s: float = 5.0) -> None:
        """Wait for the threads that could be started; they end when the file system is unmounted."""
        for thread in self._threads:
            if thread.ident is not None:  # it was started: `start` may have failed half-way
                thread.join(timeout_s)

    def close(self) -> None:
        """Let go of what was opened; pyfuse3 has ended and closed its end of the socket by then."""
        self._link.close()
        os.close(self._ended)

    @property
    def is_over(self) -> bool:
        """Whether the file system is unmounted."""
        return self._is_over

    def statistics(self) -> dict[str, int]:
        """Requests on the page path, and how many of them were deferred and refused as poison, since the worker's start."""
        return {"requests": self._counts.requests, "deferred": self._counts.deferred, "poisoned": self._counts.poisoned}

    def traffic(self) -> int:
        """Requests on the page path since the worker's start, counted as `latency` counts them."""
        return self._counts.requests + (STORE_WEIGHT - 1) * self._counts.writes

    def _run_prepared(self, run: Callable[[], None]) -> None:
        self._try(prepare_thread)
        run()

    def _run_warmed(self, run: Callable[[], None], number: int) -> None:
        """Run a thread that serves pages, which touches beforehand what it will touch: that may not be there later."""
        self._handling.join(number)
        self._try(prepare_thread)
        self._try(self._pager.warm_thread)
        run()

    def _try(self, step: Callable[[], object]) -> None:
        """Do a step of a thread's preparation; a thread that could not be prepared serves all the same."""
        try:
            step()
        except Exception as error:
            self._bugs.note(error)
            time.sleep(PAUSE_S)

    def _serve_pages(self) -> None:
        self.pages.followers.serve(self._lead)

    def _lead(self) -> bool:
        """Lead until the role is handed over or it is over, which ends all threads; whether it is over."""
        is_over = True
        try:
            is_over = self.pages.lead()
        finally:
            if is_over:
                self._end()
        return is_over

    def _end(self) -> None:
        # First, and without trio: the event loop asks for it, and may be between two runs.
        self._is_over = True
        os.eventfd_write(self._ended, 1)
        self.pages.end()
        self._link.end()
