"""Which writes of control files nobody waits for any more, as the relay and pyfuse3's tasks come to know it."""

from __future__ import annotations

from tmemfs.fuse.interrupts import Interrupts


def test_the_handle_of_a_write_that_is_interrupted_is_told() -> None:
    interrupts, told = Interrupts(), list[int]()
    interrupts.tell(told.append)
    interrupts.began(10, 4)
    interrupts.began(12, 5)
    assert not interrupts.is_interrupted(4)
    interrupts.interrupt(12)
    assert told == [5] and interrupts.is_interrupted(5) and not interrupts.is_interrupted(4)


def test_an_interrupt_of_anything_else_or_of_what_is_answered_is_nothing() -> None:
    interrupts, told = Interrupts(), list[int]()
    interrupts.tell(told.append)
    interrupts.began(10, 4)
    interrupts.ended(10)
    for unique in (10, 99):
        interrupts.interrupt(unique)
        interrupts.ended(unique)
    assert not told and not interrupts.is_interrupted(4)


def test_the_next_write_to_a_handle_is_not_interrupted() -> None:
    interrupts = Interrupts()
    interrupts.began(10, 4)
    interrupts.interrupt(10)
    interrupts.ended(10)
    interrupts.began(12, 4)
    assert not interrupts.is_interrupted(4)
