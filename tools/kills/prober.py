"""How long a page request waits for its answer: a thread that sends one after the other to an image, and notes each.

The requests are reads and writes of single pages with O_DIRECT, so each goes through the page path and none through a cache. The
stall of a death is the longest time that one of them waited, counted from the signal at the earliest, until the first request that
was sent after the death is answered. It includes what the machine's other load takes from the thread (a few ms here), but not the
pause between two requests.
"""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tmemfs.units import PAGE_BYTES

#: Requests that are remembered, of up to some 1000 per second; a stall is looked for at once, and while it lasts none is answered.
_REMEMBERED: Final = 5_000
_POLL_S: Final = 0.001
_ENDED_S: Final = 10.0


class Unanswered(Exception):
    """A request failed, had wrong bytes in its answer, or got no answer."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that was answered; times of time.monotonic_ns."""

    began_ns: int
    ended_ns: int


def stall_ns(requests: Iterable[Answered], sent_ns: int, ended_ns: int) -> int | None:
    """The stall of a death of which the signal was sent at `sent_ns`, and the last thread ended at `ended_ns`.

    `requests` are in the order of their answers. None: no request was sent since the death that has been answered.
    """
    longest = 0
    for request in requests:
        if request.ended_ns > sent_ns:
            longest = max(longest, request.ended_ns - max(request.began_ns, sent_ns))
        if request.began_ns >= ended_ns:
            return longest
    return None


class Reads:
    """Requests to load random pages of an image that others write."""

    def __init__(self, image: Path, pages: range, seed: int) -> None:
        self._fd = os.open(image, os.O_RDONLY | os.O_DIRECT)
        self._pages = pages
        self._random = random.Random(seed)
        # aligned to a page, as O_DIRECT needs it
        self._buffer = mmap.mmap(-1, PAGE_BYTES)
        self.verified = 0

    def request(self) -> None:
        """Load a page. Raises OSError."""
        os.preadv(self._fd, [self._buffer], self._random.choice(self._pages) * PAGE_BYTES)

    def close(self) -> None:
        """Close the image, unless that was done."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class VerifiedWrites:
    """Requests to store and load pages of an image that nobody else writes; what is loaded is compared with what was stored."""

    def __init__(self, image: Path, pages: range, seed: int) -> None:
        self._fd = os.open(image, os.O_RDWR | os.O_DIRECT)
        self._pages = pages
        self._random = random.Random(seed)
        self._seeds = dict[int, int]()
        self._next: tuple[int, int] | None = None
        self._buffer = mmap.mmap(-1, PAGE_BYTES)
        self.verified = 0

    def request(self) -> None:
        """Load and compare a page, or store it, in turn. Raises OSError, Unanswered."""
        if self._next is None:
            number = self._random.choice(self._pages)
            self._next = number, self._random.randrange(1 << 32)
            if number in self._seeds:
                self._verify(number)
            return
        number, seed = self._next
        self._buffer[:] = _content(number, seed)
        os.pwritev(self._fd, [self._buffer], number * PAGE_BYTES)
        self._seeds[number], self._next = seed, None

    def _verify(self, number: int) -> None:
        os.preadv(self._fd, [self._buffer], number * PAGE_BYTES)
        if self._buffer[:] != _content(number, self._seeds[number]):
            raise Unanswered(f"page {number} has not the bytes that were stored")
        self.verified += 1

    def verify_all(self) -> None:
        """Load and compare every page that was stored. Raises OSError, Unanswered."""
        for number in self._seeds:
            self._verify(number)

    def close(self) -> None:
        """Close the image, unless that was done."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _content(number: int, seed: int) -> bytes:
    """A page that compresses to about a third, as memory does."""
    return random.Random(number << 32 | seed).randbytes(PAGE_BYTES // 3).ljust(PAGE_BYTES, b"\1")


class Prober:
    """Sends the requests of `request` from enter to exit, in a thread, with a pause after each answer."""

    def __init__(self, name: str, request: Callable[[], None], pause_s: float = 0.001) -> None:
        self._name = name
        self._request = request
        self._pause_s = pause_s
        self._end = threading.Event()
        self._answered = deque[Answered](maxlen=_REMEMBERED)
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.count = 0

    def __enter__(self) -> Prober:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Send no more requests."""
        self._end.set()
        # it may wait for an answer that never comes
        self._thread.join(_ENDED_S)

    def check(self) -> None:
        """Raise Unanswered if a request failed."""
        if self._failure is not None:
            raise Unanswered(f"{self._name}: {self._failure}")

    def wait_for_stall(self, sent_ns: int, ended_ns: int, limit_s: float) -> int:
        """The stall of a death (see `stall_ns`) once it is over. Raises Unanswered after `limit_s`, or if a request failed."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            self.check()
            # the thread appends meanwhile
            with suppress(RuntimeError):
                if (stall := stall_ns(self._answered, sent_ns, ended_ns)) is not None:
                    return stall
            time.sleep(_POLL_S)
        raise Unanswered(f"{self._name}: no page request was answered within {limit_s:.0f} s after a death")

    def is_answered_since(self, ns: int) -> bool:
        """Whether a request that was sent at `ns` or later has been answered."""
        return bool(self._answered) and self._answered[-1].began_ns >= ns

    def _run(self) -> None:
        while not self._end.wait(self._pause_s):
            began_ns = time.monotonic_ns()
            try:
                self._request()
            except (OSError, Unanswered) as error:
                waited_s = (time.monotonic_ns() - began_ns) / 1e9
                self._failure = f"a page request failed after {waited_s:.3f} s: {error}"
                return
            self._answered.append(Answered(began_ns, time.monotonic_ns()))
            self.count += 1
