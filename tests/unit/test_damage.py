"""Damage that is counted once, acknowledged, and told to those who follow it."""

from __future__ import annotations

import threading

from tmemfs.store.damage import MOST_RECORDS, Damage, Unacknowledged


def test_a_record_is_new_once_wherever_it_is_found_again() -> None:
    damage = Damage()
    assert damage.note_record(1, 64, "in_ram") and not damage.note_record(1, 64, "on_tier")
    assert damage.note_record(2, 64, "on_tier") and damage.note_record(1, 128, "on_tier")
    damage.note_failed_read()
    assert damage.since_acknowledged == Unacknowledged(1, 2, 1)


def test_an_acknowledged_record_is_still_known() -> None:
    damage = Damage()
    damage.note_record(1, 64, "in_ram")
    assert damage.since_acknowledged
    damage.acknowledge()
    assert not damage.since_acknowledged
    assert not damage.note_record(1, 64, "in_ram") and not damage.since_acknowledged
    damage.note_failed_read()
    assert damage.since_acknowledged == Unacknowledged(failed_reads=1)


def test_records_are_counted_from_any_number_of_threads_and_forgotten_in_the_end() -> None:
    damage = Damage()

    def note(first: int) -> None:
        for offset in range(first, first + MOST_RECORDS // 4):
            damage.note_record(1, offset, "on_tier")

    threads = [threading.Thread(target=note, args=(first,)) for first in range(0, MOST_RECORDS, MOST_RECORDS // 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert damage.since_acknowledged.on_tier == MOST_RECORDS
    assert not damage.note_record(1, 0, "on_tier")
    assert damage.note_record(2, 0, "on_tier")  # one too many: all others are forgotten
    assert damage.note_record(1, 0, "on_tier") and not damage.note_record(2, 0, "on_tier")


def test_a_follower_is_told_of_each_change_while_it_follows() -> None:
    damage, told = Damage(), list[Unacknowledged]()
    damage.note_failed_read()
    with damage.told_to(lambda: told.append(damage.since_acknowledged)):
        damage.note_record(1, 0, "in_ram")
        damage.note_record(1, 0, "in_ram")
        damage.note_failed_read()
        damage.acknowledge()
    damage.note_failed_read()
    assert told == [Unacknowledged(1, 0, 1), Unacknowledged(1, 0, 2), Unacknowledged()]
