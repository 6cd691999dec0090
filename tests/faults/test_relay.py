"""The relay before a kernel that is played by a socket, on a tier that hangs: whatever it does, the others are answered."""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from struct import Struct
from typing import Any

import pytest

from tests.parts import FaultyTier, new_tmem, page_of
from tests.waiting import HANG_S, readable, wait_until
from tmemfs.engine import Engine
from tmemfs.fuse import page_path, wire
from tmemfs.fuse import relay as relay_module
from tmemfs.fuse.interrupts import Interrupts
from tmemfs.fuse.leader_followers import HAND_OVERS_AFTER_SLOW
from tmemfs.fuse.mount import Device
from tmemfs.fuse.page_path import READERS, Inheritance
from tmemfs.fuse.relay import Relay
from tmemfs.fuse.replies import GONE
from tmemfs.jobs.latency import Latency
from tmemfs.policy.bursts import BURST_REQUESTS, STORE_WEIGHT
from tmemfs.store.codec import parse_codec
from tmemfs.system.status_region import MOST_HANDLING
from tmemfs.units import PAGE_BYTES

INODE = 2
ON_TIER = range(600)
IN_RAM = range(1000, 1100)
_READ = Struct("<IIQQ16xQQI20x")  # header, fh, offset, size and the rest
_OTHER = Struct("<IIQQI12x24x")  # header with the user, and a body
STATFS = 17
INIT = Struct("<IIQ48xII32x").pack(104, wire.INIT, 1, 7, 45)[:104]


class Kernel:
    """Asks `relay` for pages of slots 0 to 599, on the tier, and 1000 to 1099, in RAM. A reply is one message."""

    def __init__(self, tier: FaultyTier) -> None:
        self.tier = tier
        self.hung = threading.Semaphore(0)
        engine = Engine.over(partial(new_tmem, slots=2048, frames=32, limit=12, extents=32), tier, parse_codec("lz4"))
        for slot in (*ON_TIER, *IN_RAM):
            engine.pager.write(slot * PAGE_BYTES, memoryview(page_of("raw", slot)))
            if slot == ON_TIER[-1]:
                self._write_back(engine)
        self.end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.end.settimeout(HANG_S)
        self.device = theirs
        self.pager = engine.pager
        self.reader = engine.reader
        inheritance = Inheritance.none(INODE)
        self.handling = inheritance.handling.words
        self.latency = Latency("off", clock=lambda: 0.0)
        device = Device(theirs.fileno(), INIT, resends=True)
        self.relay = Relay(device, engine.pager, INODE, inheritance, latency=self.latency)
        warmed = threading.Semaphore(0)
        tier.before["read"] = warmed.release
        self.relay.start()
        for _ in range(READERS + 2):  # the leader and the followers, and the one for stores, try a read at their start
            assert warmed.acquire(timeout=HANG_S)
        tier.fail()
        assert self.forwarded() == 1  # INIT comes before all else
        os.write(self.relay.namespace_fd, wire.empty_reply(1))
        assert self.end.recv(PAGE_BYTES) == wire.empty_reply(1)

    def _write_back(self, engine: Engine) -> None:
        while (plan := engine.tmem.plan_write_back(include_open=True)) is not None:
            engine.tier.write(plan.extent, plan.data, plan.sequence)
            engine.tmem.commit_write_back(plan)

    def hang(self) -> None:
        """Reads of the tier wait for `hung` from now on."""
        self.tier.before["read"] = lambda: (self.hung.acquire(), None)[1]

    def ask(self, *slots: int) -> None:
        """Ask for pages; a slot is its request's number, too."""
        for slot in slots:
            self.end.send(_READ.pack(wire.IO_BYTES, wire.READ, slot, INODE, 0, slot * PAGE_BYTES, PAGE_BYTES))

    def ask_namespace(self, opcode: int, unique: int, user: int) -> None:
        """Ask what pyfuse3 answers."""
        self.end.send(_OTHER.pack(_OTHER.size, opcode, unique, 1, user))

    def forwarded(self) -> int:
        """The number of the next request that pyfuse3 is given."""
        assert readable(self.relay.namespace_fd)
        return int(wire.HEADER.unpack_from(os.read(self.relay.namespace_fd, PAGE_BYTES))[2])

    def answer(self) -> int:
        """The slot of the next reply, which holds its page."""
        message = self.end.recv(2 * PAGE_BYTES)
        length, error, slot = wire.REPLY.unpack_from(message)
        assert (length, error) == (len(message), 0) and message[wire.REPLY_BYTES :] == page_of("raw", slot)
        return int(slot)

    def close(self) -> None:
        """End as a kernel does: every thread that reads gets an error from now on."""
        self.hung.release(1000)
        self.ask(IN_RAM[0])
        assert readable(self.end.fileno())
        # The socket gives its error once, perhaps to a thread that replies. Reads of what is open to write alone all fail.
        with open(os.devnull, "wb") as unreadable:
            os.dup2(unreadable.fileno(), self.device.fileno())
        self.end.close()
        os.close(self.relay.namespace_fd)
        self.relay.join()
        names = {thread.name for thread in self.relay._threads if thread.is_alive()}
        self.relay.close()
        self.device.close()
        assert not names


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    # a socket whose other end was closed gives this where /dev/fuse gives ENODEV
    monkeypatch.setattr(page_path, "GONE", GONE | {errno.ECONNRESET})
    made = Kernel(FaultyTier())
    yield made
    made.close()


def test_pages_come_from_ram_and_from_the_tier(kernel: Kernel) -> None:
    for slot in (3, 1003, 4, 5, 1004, 599):
        kernel.ask(slot)
        assert kernel.answer() == slot


def test_requests_of_all_kinds_are_noted_until_a_burst_begins(kernel: Kernel) -> None:
    kernel.latency.is_armed = True
    for number in range(BURST_REQUESTS):
        assert kernel.latency.is_armed
        if number % 3 == 2:  # of two pages, and so served by `_serve`
            kernel.end.send(_READ.pack(wire.IO_BYTES, wire.READ, 1000, INODE, 0, 1000 * PAGE_BYTES, 2 * PAGE_BYTES))
            assert len(kernel.end.recv(4 * PAGE_BYTES)) == wire.REPLY_BYTES + 2 * PAGE_BYTES
        else:
            slot = (3, 1003)[number % 3]
            kernel.ask(slot)
            assert kernel.answer() == slot
    assert not kernel.latency.is_armed


def test_stores_are_noted_with_their_weight(kernel: Kernel) -> None:
    kernel.latency.is_armed = True
    before = kernel.relay.traffic()
    for number in range(BURST_REQUESTS // STORE_WEIGHT):
        assert kernel.latency.is_armed
        kernel.end.send(
            _READ.pack(wire.IO_BYTES + PAGE_BYTES, wire.WRITE, 3000, INODE, 0, 900 * PAGE_BYTES, PAGE_BYTES) + page_of("raw", 1)
        )
        assert kernel.end.recv(PAGE_BYTES) == wire.written_reply(3000, PAGE_BYTES)
        assert kernel.relay.traffic() == before + (number + 1) * STORE_WEIGHT
    assert not kernel.latency.is_armed


@pytest.mark.parametrize("reads", [1, 2, READERS, READERS + 1, 3 * READERS])
def test_a_tier_that_hangs_holds_up_no_page_in_ram(kernel: Kernel, reads: int) -> None:
    kernel.hang()
    for slot in range(reads):
        kernel.ask(slot, 1000 + slot)
        assert kernel.answer() == 1000 + slot
    kernel.hung.release(reads)
    assert sorted(kernel.answer() for _ in range(reads)) == list(range(reads))


def test_after_it_hung_it_goes_on(kernel: Kernel) -> None:
    kernel.hang()
    kernel.ask(1, 1001)
    assert kernel.answer() == 1001
    kernel.tier.fail()
    kernel.hung.release()
    assert kernel.answer() == 1
    for slot in range(2, 2 * HAND_OVERS_AFTER_SLOW):
        kernel.ask(slot)
        assert kernel.answer() == slot


def test_a_tier_of_any_speed_answers_each_request_once(kernel: Kernel) -> None:
    chance = random.Random(7)
    kernel.tier.before["read"] = lambda: time.sleep(chance.choice((0, 0, 0, 0.0003, 0.001)))
    wanted = [chance.choice(ON_TIER) if chance.random() < 0.7 else chance.choice(IN_RAM) for _ in range(2000)]
    got = []
    for at in range(0, len(wanted), 8):
        kernel.ask(*wanted[at : at + 8])
        got += [kernel.answer() for _ in wanted[at : at + 8]]
        assert sorted(got[at:]) == sorted(wanted[at : at + 8])


def fail_once(monkeypatch: pytest.MonkeyPatch, target: object, name: str, error: Exception) -> threading.Event:
    """The next call of `name` raises; later ones do what they did."""
    real, failed = getattr(target, name), threading.Event()

    def fake(*arguments: Any) -> Any:
        if not failed.is_set():
            failed.set()
            raise error
        return real(*arguments)

    monkeypatch.setattr(target, name, fake)
    return failed


def test_an_unknown_error_of_the_device_does_not_end_the_page_path(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = fail_once(monkeypatch, os, "readv", OSError(errno.ENOMEM, "injected"))
    kernel.hang()
    kernel.ask(1, 1001)  # the tier hangs, so another thread becomes the leader: with the readv that fails
    assert kernel.answer() == 1001
    kernel.hung.release()
    assert kernel.answer() == 1
    assert failed.is_set() and not kernel.relay.is_over


def test_a_request_that_cannot_be_forwarded_is_answered_with_an_error(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_once(monkeypatch, Interrupts, "began", MemoryError())
    kernel.end.send(_READ.pack(wire.IO_BYTES, wire.WRITE, 5001, 1, 0, 0, 0))
    assert wire.REPLY.unpack(kernel.end.recv(100)) == (wire.REPLY_BYTES, -errno.EIO, 5001)
    kernel.ask(1001)
    assert kernel.answer() == 1001


def test_what_pyfuse3_dropped_is_answered_once(kernel: Kernel) -> None:
    namespace = socket.socket(fileno=os.dup(kernel.relay.namespace_fd))
    with namespace:
        kernel.end.send(_READ.pack(wire.IO_BYTES, 1, 6001, 1, 0, 0, 0))  # a LOOKUP
        namespace.recv(1000)
        kernel.relay.fail_forwarded()
        assert wire.REPLY.unpack(kernel.end.recv(100)) == (wire.REPLY_BYTES, -errno.EIO, 6001)
        namespace.send(wire.empty_reply(6001))  # too late
        kernel.ask(1001)
        assert kernel.answer() == 1001


def test_a_reply_that_cannot_be_copied_does_not_end_its_thread(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace = socket.socket(fileno=os.dup(kernel.relay.namespace_fd))
    with namespace:
        failed = fail_once(monkeypatch, Interrupts, "ended", MemoryError())
        namespace.send(wire.empty_reply(0))
        namespace.send(wire.empty_reply(0))
        assert wire.REPLY.unpack(kernel.end.recv(100)) == (wire.REPLY_BYTES, 0, 0) and failed.is_set()


def test_root_and_pages_do_not_wait_for_a_thousand_requests_of_others(kernel: Kernel) -> None:
    for number in range(1000):
        kernel.ask_namespace(STATFS, number, user=1000)
    kernel.ask(1003)
    kernel.ask_namespace(STATFS, 5000, user=0)
    assert kernel.answer() == 1003
    before = 0
    while kernel.forwarded() != 5000:
        before += 1
    assert before < 1000


@pytest.mark.parametrize("opcode", [wire.RELEASE, wire.RELEASEDIR])
def test_a_release_is_answered_before_pyfuse3_sees_it(kernel: Kernel, opcode: int) -> None:
    for number in range(100):
        kernel.ask_namespace(opcode, number, user=0)
        assert wire.REPLY.unpack(kernel.end.recv(PAGE_BYTES)) == (wire.REPLY_BYTES, 0, number)
    assert [kernel.forwarded() for _ in range(100)] == list(range(100))


def test_a_request_is_answered_also_where_no_error_could_be_composed_at_first(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = fail_once(monkeypatch, wire, "error_reply", MemoryError())
    kernel.tier.fail("read")
    kernel.ask(7)
    assert wire.REPLY.unpack(kernel.end.recv(100)) == (wire.REPLY_BYTES, -errno.EIO, 7)
    kernel.tier.fail()
    for slot in (1001, 8):
        kernel.ask(slot)
        assert kernel.answer() == slot
    assert failed.is_set() and not kernel.relay.is_over


@pytest.mark.parametrize("name", ["load_page", "read_page"])
def test_an_error_on_the_page_path_costs_its_request_alone(kernel: Kernel, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Errors of the pager and of what answers for it, at the same time."""
    kernel.hang()
    kernel.ask(1, 1001)  # another thread becomes the leader, which takes the pager's functions again
    wait_until(lambda: kernel.reader.waiting == 1)  # for the tier, so the function that fails is the next load's
    fail_once(monkeypatch, kernel.pager, name, MemoryError())
    fail_once(monkeypatch, wire, "error_reply", MemoryError())
    kernel.hung.release()
    assert sorted((kernel.answer(), kernel.answer())) == [1, 1001]
    kernel.tier.fail()
    kernel.ask(2, 3, 1002)
    replies = [wire.REPLY.unpack_from(kernel.end.recv(2 * PAGE_BYTES)) for _ in range(3)]
    assert sorted(unique for _, _, unique in replies) == [2, 3, 1002] and not kernel.relay.is_over


class NoPoll:
    """A poll that fails."""

    def poll(self, timeout_ms: int) -> list[tuple[int, int]]:
        raise MemoryError


def test_a_leader_that_cannot_learn_whether_requests_wait_goes_on(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel.relay.pages, "_arrivals", NoPoll())
    for slot in (1, 1001, 2, 1002):
        kernel.ask(slot)
        assert kernel.answer() == slot


def test_an_error_of_the_socket_does_not_end_the_thread_for_replies(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would take pyfuse3's replies any more: at last it would wait in one, with the interpreter's lock."""
    failed = fail_once(monkeypatch, socket.socket, "recv_into", OSError(errno.ENOMEM, "injected"))
    namespace = socket.socket(fileno=os.dup(kernel.relay.namespace_fd))
    with namespace:
        for _ in range(3):  # the first one is taken by a call that has begun already
            namespace.send(wire.empty_reply(0))
            assert wire.REPLY.unpack(kernel.end.recv(100)) == (wire.REPLY_BYTES, 0, 0)
    assert failed.is_set()


def test_a_thread_that_could_not_be_prepared_serves_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [3]

    def prepare() -> None:
        if left[0]:
            left[0] -= 1
            raise MemoryError

    monkeypatch.setattr(page_path, "GONE", GONE | {errno.ECONNRESET})
    monkeypatch.setattr(relay_module, "prepare_thread", prepare)
    kernel = Kernel(FaultyTier())
    kernel.ask(1001)
    assert kernel.answer() == 1001
    assert all(thread.is_alive() for thread in kernel.relay._threads)
    kernel.close()


@pytest.mark.parametrize("slot", [ON_TIER[0], IN_RAM[0]])
def test_the_supervisor_sees_that_a_request_was_answered(kernel: Kernel, slot: int) -> None:
    assert not kernel.handling[MOST_HANDLING]
    kernel.ask(slot)
    assert kernel.answer() == slot
    wait_until(lambda: kernel.handling[MOST_HANDLING])
