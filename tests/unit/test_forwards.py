"""Requests on their way to pyfuse3: root's at once, the others at a pace and in turn by user."""

from __future__ import annotations

import threading
import time

from tmemfs.fuse import wire
from tmemfs.fuse.forwards import BURST_S, BUSY_GAP_S, IDLE_GAP_S, Forwards, Pace

STATFS = 17


def request(user: int, number: int = 0, opcode: int = STATFS) -> bytes:
    header = bytearray(wire.REQUEST_HEADER_BYTES)
    wire.HEADER.pack_into(header, 0, wire.REQUEST_HEADER_BYTES, opcode, number, 1)
    wire.USER.pack_into(header, wire.USER_AT, user)
    return bytes(header)


class Clock:
    """Time that passes only when somebody waits for a request that does not come."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pages = 0

    def __call__(self) -> float:
        return self.now


def sent_within(pace: Pace, clock: Clock, seconds: float, pages_per_request: int) -> int:
    """How many requests go in `seconds` if there is always one that waits."""
    end, sent = clock.now + seconds, 0
    while clock.now < end:
        clock.now += pace.wait_s(clock.now)
        clock.pages += pages_per_request
        pace.spend(clock.now)
        sent += 1
    return sent


def test_while_pages_are_asked_for_the_others_get_few_requests() -> None:
    clock = Clock()
    pace = Pace(lambda: clock.pages, clock.now)
    assert sent_within(pace, clock, 10, pages_per_request=1) <= (10 + BURST_S) / BUSY_GAP_S + 1


def test_while_none_are_they_get_more_but_not_a_core() -> None:
    clock = Clock()
    pace = Pace(lambda: clock.pages, clock.now)
    sent = sent_within(pace, clock, 10, pages_per_request=0)
    assert 10 / IDLE_GAP_S <= sent <= (10 + BURST_S) / IDLE_GAP_S + 1


def test_what_was_not_used_counts_for_a_burst_at_most() -> None:
    clock = Clock()
    pace = Pace(lambda: clock.pages, clock.now)
    clock.now += 3600
    sent = 0
    while not pace.wait_s(clock.now):
        pace.spend(clock.now)
        sent += 1
    assert abs(sent - BURST_S / IDLE_GAP_S) <= 1


def test_root_does_not_wait_for_the_others() -> None:
    clock = Clock()
    forwards = Forwards(lambda: clock.pages, clock)
    for number in range(1000):
        forwards.put(request(1000, number))
    forwards.put(request(0, 7))
    assert forwards.get() == request(0, 7)


def test_users_take_turns_and_each_keeps_its_order() -> None:
    clock = Clock()
    forwards = Forwards(lambda: clock.pages, clock)
    for number in range(6):
        forwards.put(request(1000, number))
    for user in (1001, 1002):
        forwards.put(request(user, 0))
        forwards.put(request(user, 1))
    found = []
    for _ in range(10):
        found.append(forwards.get())
        clock.now += BUSY_GAP_S
    assert found == [request(user, number) for number in (0, 1) for user in (1000, 1001, 1002)] + [
        request(1000, number) for number in (2, 3, 4, 5)
    ]


def test_a_release_belongs_to_no_user() -> None:
    clock = Clock()
    forwards = Forwards(lambda: clock.pages, clock)
    for number in range(3):
        forwards.put(request(0, number, wire.RELEASE))
    forwards.put(request(0, 3))
    assert [wire.HEADER.unpack_from(forwards.get() or b"")[2] for _ in range(4)] == [3, 0, 1, 2]


def test_releases_keep_up_with_what_root_opens() -> None:
    clock = Clock()  # which stands, so nothing goes that has to wait
    forwards = Forwards(lambda: clock.pages, clock)
    for number in range(1000):
        forwards.put(request(0, number))
        forwards.put(request(0, number, wire.RELEASE))
    assert len({forwards.get() for _ in range(2000)}) == 2000


def test_releases_keep_up_however_many_users_open_files() -> None:
    clock = Clock()
    forwards = Forwards(lambda: clock.pages, clock)
    for user in range(1000, 1100):
        forwards.put(request(user))
    for _ in range(5000):
        clock.now += BUSY_GAP_S
        sent = forwards.get() or b""
        if wire.HEADER.unpack_from(sent)[1] != wire.RELEASE:  # it opens, closes and opens again
            forwards.put(request(0, opcode=wire.RELEASE))
            forwards.put(sent)
        assert len(forwards._releases) <= 1


def test_it_ends_although_some_wait() -> None:
    clock = Clock()
    forwards = Forwards(lambda: clock.pages, clock)
    forwards.put(request(1000))
    forwards.put(None)
    assert forwards.get() is None


def test_who_waits_for_a_request_gets_it_when_it_comes() -> None:
    forwards = Forwards(lambda: 0, time.monotonic)
    found: list[bytes | None] = []
    thread = threading.Thread(target=lambda: found.extend((forwards.get(), forwards.get())))
    thread.start()
    forwards.put(request(1000, 1))
    forwards.put(request(0, 2))
    thread.join(10)
    assert sorted(found, key=str) == sorted((request(1000, 1), request(0, 2)), key=str)
