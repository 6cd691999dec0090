"""Requests before a kernel that is played here, and workers that die at any line of the page path: none is lost, none is done late.

The kernel issues requests, and no two at the same time that change one page, as neither swap nor a file system does. A worker
reads them, defers some, answers them in any order, and dies at a line of its code that hypothesis chooses. The next one takes up
what is left, in both ways: the kernel hands it out again, or it lies in the region. After each step each page holds what the last
answered change left there, or, while a change of it is not answered, that or the change.
"""

from __future__ import annotations

import errno
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from struct import Struct
from types import FrameType
from typing import Any, Final, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tmemfs.errors import NoSpace
from tmemfs.fuse import kept_requests, page_path, replies, wire
from tmemfs.fuse.bugs import Bugs
from tmemfs.fuse.handling import Handling
from tmemfs.fuse.kept_requests import KeptRequests
from tmemfs.fuse.namespace_link import NamespaceLink
from tmemfs.fuse.page_path import Inheritance, PageCounts, PagePath
from tmemfs.fuse.replies import Replies
from tmemfs.jobs.latency import Latency
from tmemfs.pages.pager import Deferred, Pager
from tmemfs.store.region import Region
from tmemfs.units import PAGE_BYTES

INODE: Final = 2
PAGES: Final = 6
BUFFERS: Final = 3
ENTRIES: Final = 128
GETATTR: Final = 3
DEVICE: Final = 1_000_000
_IO: Final = Struct("<IIQQ16xQQI20x")
_FALLOCATE: Final = Struct("<IIQQ16xQQQI4x")
_OTHER: Final = Struct("<IIQQ16x16x")
_FILES: Final = frozenset(module.__file__ for module in (kept_requests, page_path, replies, wire))


class Killed(BaseException):
    """The worker is killed."""


class Idle(BaseException):
    """No request waits, so the thread would sleep."""


@dataclass(eq=False)
class Request:
    """One of the kernel's; a change of pages leaves `number` there, 0 for a discard."""

    unique: int
    opcode: int
    node: int
    first: int = 0
    count: int = 0
    number: int = 0
    sent: bytes = b""
    answers: list[int] = field(default_factory=list)

    @property
    def pages(self) -> range:
        """Those that it is about."""
        return range(self.first, self.first + self.count)


def page_with(number: int) -> bytes:
    """A page that holds `number`."""
    return number.to_bytes(8, "little") * (PAGE_BYTES // 8)


class Kernel:
    """The file descriptor DEVICE; `resends` as Linux 6.9 does."""

    def __init__(self, resends: bool) -> None:
        self.resends = resends
        self.pending: deque[Request] = deque()
        self.processing: dict[int, Request] = {}
        self.finished: list[Request] = []
        self._unique = 2

    def ask(self, opcode: int, node: int, first: int = 0, count: int = 0, number: int = 0) -> Request:
        """Issue a request."""
        self._unique += 2
        request = Request(self._unique, opcode, node, first, count, number)
        self.pending.append(request)
        return request

    def readv(self, device: int, buffers: list[memoryview]) -> int:
        """readv(2)."""
        if not self.pending:
            raise Idle
        request = self.pending.popleft()
        if request.opcode not in (wire.FORGET, wire.INTERRUPT):
            self.processing[request.unique] = request
        message = self._message(request)
        head, data = buffers
        head[: len(message[:80])] = message[:80]
        data[: len(message[80:])] = message[80:]
        return len(message)

    def _message(self, request: Request) -> bytes:
        at, size = request.first * PAGE_BYTES, request.count * PAGE_BYTES
        if request.opcode == wire.FALLOCATE:
            return _FALLOCATE.pack(_FALLOCATE.size, wire.FALLOCATE, request.unique, request.node, 0, at, size, wire.PUNCH_HOLE)
        if request.opcode in (wire.READ, wire.WRITE):
            data = page_with(request.number) * request.count if request.opcode == wire.WRITE else b""
            return _IO.pack(_IO.size + len(data), request.opcode, request.unique, request.node, 0, at, size) + data
        return _OTHER.pack(_OTHER.size, request.opcode, request.unique, request.node)

    def writev(self, device: int, parts: tuple[bytes, ...]) -> int:
        """writev(2)."""
        reply = b"".join(parts)
        _, error, unique = wire.REPLY.unpack_from(reply)
        if reply == wire.RESEND:
            assert self.resends
            # As the kernel does, not in the order of their numbers.
            again = sorted(self.processing.values(), key=lambda request: request.unique * 7919 % 101)
            self.processing = {}
            for request in again:
                request.unique |= wire.RESENT
            self.pending.extendleft(reversed(again))
            return len(reply)
        request_or_none = self.processing.pop(unique, None)
        if request_or_none is None:
            raise OSError(errno.ENOENT, "answered before")
        request_or_none.answers.append(-error)
        request_or_none.sent = reply[wire.REPLY_BYTES :]
        self.finished.append(request_or_none)
        return len(reply)

    def write(self, device: int, reply: memoryview) -> int:
        """write(2)."""
        return self.writev(device, (bytes(reply),))


class Image:
    """A pager over pages that outlive each worker; what `defers` says is done later."""

    swap_bytes = PAGES * PAGE_BYTES

    def __init__(self) -> None:
        self.numbers = [0] * PAGES
        self.defers = 0
        self.refuses = False
        self.waiting = 0

    def load_page(self, slot: int) -> bytes | None:
        """As Pager."""
        return None if self._is_deferred() else page_with(self.numbers[slot])

    def read_page(self, slot: int) -> bytes:
        """As Pager."""
        return page_with(self.numbers[slot])

    def read(self, offset: int, size: int) -> bytes | Deferred:
        """As Pager."""
        first, count = offset // PAGE_BYTES, size // PAGE_BYTES
        found = b"".join(map(page_with, self.numbers[first : first + count]))
        return Deferred("load", lambda: found) if self._is_deferred() else found

    def write(self, offset: int, data: memoryview) -> Deferred | None:
        """As Pager: no store passes one that waits; one that is refused forgets the pages."""
        first = offset // PAGE_BYTES
        written = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), PAGE_BYTES)]

        def store() -> None:
            if self.refuses:
                self.numbers[first : first + len(written)] = [0] * len(written)
                raise NoSpace("refused")
            for at, number in enumerate(written, first):
                self.numbers[at] = number

        if not self.waiting and not self._is_deferred():
            store()
            return None
        self.waiting += 1

        def finish() -> None:
            try:
                store()
            finally:
                self.waiting -= 1

        return Deferred("store", finish)

    def discard(self, offset: int, length: int) -> Deferred | None:
        """As Pager: it passes stores that wait."""
        first, count = offset // PAGE_BYTES, length // PAGE_BYTES

        def forget() -> None:
            self.numbers[first : first + count] = [0] * count

        if self._is_deferred():
            return Deferred("long", forget)
        forget()
        return None

    def _is_deferred(self) -> bool:
        self.defers, odd = divmod(self.defers, 2)
        return bool(odd)


class Link:
    """Holds what it is given, as pyfuse3 does until it answers."""

    def __init__(self) -> None:
        self.given: list[int] = []

    def forward(self, head: memoryview, data: memoryview, count: int, opcode: int) -> None:
        """As NamespaceLink."""
        if opcode not in wire.NO_REPLY:
            self.given.append(wire.HEADER.unpack_from(head)[2])


@contextmanager
def killed_at(line: int | None) -> Iterator[None]:
    """Killed is raised before the `line`-th line of the page path that is run from now on; None: it is not."""
    left = [-1 if line is None else line]

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in _FILES:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise Killed
        return trace

    before = sys.gettrace()
    if line is not None:
        sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def wait_at_most_not(condition: Callable[[], object]) -> None:
    """The thread for stores is this one, so the leader cannot wait for it."""
    if not condition():
        raise Idle


class RequestsModel(RuleBasedStateMachine):
    """Rules issue requests, let a worker run for a while, and kill it."""

    resends = False

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(kept_requests, "BUFFERS", BUFFERS)
        self.patch.setattr(kept_requests, "ENTRIES", ENTRIES)
        self.kernel = Kernel(self.resends)
        for name in ("readv", "write", "writev"):
            self.patch.setattr(os, name, self._routed(getattr(os, name), getattr(self.kernel, name)))
        self.image = Image()
        self.region = Region("requests", KeptRequests.region_bytes(keeps=not self.resends))
        self.expected: list[set[int]] = [{0} for _ in range(PAGES)]
        self.open: list[Request] = []
        self.is_first = True
        self.numbers = 0
        self.stores_lost_to_size = False
        self._fork()

    def _routed(self, real: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
        return lambda fd, *arguments: ours(fd, *arguments) if fd == DEVICE else real(fd, *arguments)

    def _fork(self) -> None:
        """The next worker."""
        self.image.waiting = 0
        self.link = Link()
        self.counts = PageCounts()
        kept = KeptRequests(self.region, not self.resends, INODE)
        self.patch.setattr(kept._freed, "wait_for", wait_at_most_not)
        inheritance = Inheritance(kept, Handling(), {}, self.is_first)
        self.replies = Replies(DEVICE, Bugs(), kept)
        link, pager = cast(NamespaceLink, self.link), cast(Pager, self.image)
        self.pages = PagePath(DEVICE, pager, INODE, inheritance, link, self.replies, self.counts, Bugs(), Latency("off"))
        self.is_first = False

    def teardown(self) -> None:
        """The last worker is not killed: all requests are answered, each once."""
        try:
            self.image.refuses = False
            self._fork()
            for _ in range(3):
                self.lead(0, None)
                self.finish_stores(None)
                self.answer_namespace(None)
            assert not self.open, "requests without an answer"
            kept = KeptRequests(self.region, not self.resends, INODE)
            assert len(kept.left_over()) <= 1, "beside the one that was read last, requests that nothing frees"
            self.pages_hold_what_was_answered()
        finally:
            self.patch.undo()
            self.region.close()

    # ---- the kernel's side -----------------------------------------------------------------------------------------

    def _changing(self) -> set[int]:
        return {page for request in self.open if request.opcode in (wire.WRITE, wire.FALLOCATE) for page in request.pages}

    @rule(first=st.integers(0, PAGES - 1), count=st.integers(1, 3), is_discard=st.booleans())
    def change(self, first: int, count: int, is_discard: bool) -> None:
        """A WRITE or FALLOCATE of pages of which no other one is under way."""
        count = min(count, PAGES - first)
        if self._changing() & set(range(first, first + count)):
            return
        self.numbers += 1
        opcode = wire.FALLOCATE if is_discard else wire.WRITE
        request = self.kernel.ask(opcode, INODE, first, count, 0 if is_discard else self.numbers)
        self.open.append(request)
        for page in request.pages:
            self.expected[page] = self.expected[page] | {request.number}

    @rule(first=st.integers(0, PAGES - 1), count=st.integers(1, 2))
    def read(self, first: int, count: int) -> None:
        """A READ."""
        self.open.append(self.kernel.ask(wire.READ, INODE, first, min(count, PAGES - first)))

    @rule(opcode=st.sampled_from((GETATTR, wire.FORGET, wire.RELEASE)))
    def ask_for_namespace(self, opcode: int) -> None:
        """What pyfuse3 gets."""
        request = self.kernel.ask(opcode, INODE)
        if opcode == GETATTR:
            self.open.append(request)

    # ---- the worker's side -----------------------------------------------------------------------------------------

    def _run(self, step: Callable[[], object], line: int | None) -> None:
        """Run `step`, which the worker may not survive."""
        try:
            with killed_at(line):
                step()
        except Idle:
            pass
        except Killed:
            self._fork()
        self._note_answers()

    @rule(defers=st.integers(0, 255), line=st.none() | st.integers(1, 120))
    def lead(self, defers: int, line: int | None) -> None:
        """The leader runs until no request waits, or dies."""
        self.image.defers = defers
        self._run(self._lead, line)

    def _lead(self) -> None:
        role = self.pages.followers._role
        while True:
            role.acquire()
            try:
                assert not self.pages.lead()  # it handed the role over: to this thread, as there is no other
            except BaseException:
                if role.locked():
                    role.release()
                raise

    @rule(line=st.none() | st.integers(1, 60))
    def finish_stores(self, line: int | None) -> None:
        """The stores that wait are finished, in order."""
        self.image.defers = 0
        self.pages.end()
        self._run(self.pages.finish_stores, line)

    @precondition(lambda self: self.link.given)
    @rule(line=st.none() | st.integers(1, 20))
    def answer_namespace(self, line: int | None) -> None:
        """What pyfuse3 was given is answered."""
        while self.link.given:
            unique = self.link.given.pop()
            self._run(lambda unique=unique: self.replies.send(wire.empty_reply(unique)), line)  # type: ignore[misc]

    @rule(lines=st.lists(st.integers(1, 60), max_size=3))
    def kill(self, lines: list[int]) -> None:
        """The worker dies at rest, and some after it before they read anything."""
        for line in lines:
            with suppress(Killed), killed_at(line):
                self._fork()
        self._fork()

    @rule(refuses=st.booleans())
    def refuse(self, refuses: bool) -> None:
        """The pool is full, or is not any more."""
        self.image.refuses = refuses

    # ---- what must hold --------------------------------------------------------------------------------------------

    def _note_answers(self) -> None:
        """See what the kernel got, in the order in which it got it."""
        for request in self.kernel.finished:
            assert len(request.answers) == 1
            if request not in self.open:
                assert request.opcode == wire.RELEASE
                continue
            self.open.remove(request)
            (error,) = request.answers
            if request.opcode == wire.READ:
                assert not error
            if request.opcode == wire.FALLOCATE:
                assert not error
            if request.opcode in (wire.WRITE, wire.FALLOCATE):
                # A write that failed may have left anything of the two, or nothing.
                for page in request.pages:
                    self.expected[page] = {0, *self.expected[page]} if error else {request.number}
        self.kernel.finished.clear()

    @invariant()
    def pages_hold_what_was_answered(self) -> None:
        """Neither a lost change nor one that was done after its answer."""
        for page, number in enumerate(self.image.numbers):
            assert number in self.expected[page] | ({0} if page in self._changing() else set()), (page, number, self.expected[page])


class ResentModel(RequestsModel):
    """The kernel hands requests out again."""

    resends = True


_SETTINGS: Final = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestKeptRequests = RequestsModel.TestCase
TestKeptRequests.settings = _SETTINGS
TestResentRequests = ResentModel.TestCase
TestResentRequests.settings = _SETTINGS
