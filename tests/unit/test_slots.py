"""The slot table: one word per slot, empty strides passed over, the same table for every process that maps the region."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tmemfs.store.region import Region
from tmemfs.store.slots import SLOT_BYTES, SlotTable

COUNT = 2500
SLOT = st.integers(0, COUNT - 1)


@pytest.fixture
def table() -> Iterator[SlotTable]:
    table = SlotTable(COUNT)
    yield table
    table.region.close()


def test_a_new_table_is_empty(table: SlotTable) -> None:
    assert list(table.occupied(0, COUNT)) == []
    assert table.handles[COUNT - 1] == 0


@pytest.mark.parametrize("slot", [0, 1, 511, 512, 513, 1023, 1024, COUNT - 1])
def test_a_handle_lies_at_eight_times_its_slot(table: SlotTable, slot: int) -> None:
    table.handles[slot] = 0x0123456789ABCDEF
    at = slot * SLOT_BYTES
    assert bytes(table.region.view[at : at + SLOT_BYTES]) == (0x0123456789ABCDEF).to_bytes(8, sys.byteorder)
    assert bytes(table.region.view).count(0) == table.region.size_bytes - SLOT_BYTES
    assert list(table.occupied(0, COUNT)) == [slot]


@given(slots=st.sets(SLOT, max_size=30), first=SLOT, end=st.integers(0, COUNT))
@example(slots={511, 512, 1023, 1024}, first=512, end=1024)
@example(slots={0, COUNT - 1}, first=0, end=COUNT)
@example(slots={5}, first=6, end=5)
def test_the_occupied_slots_are_those_with_a_handle_in_the_range(slots: set[int], first: int, end: int) -> None:
    table = SlotTable(COUNT)
    for slot in slots:
        table.handles[slot] = 1
    assert list(table.occupied(first, end)) == sorted(slot for slot in slots if first <= slot < end)
    table.region.close()


def test_a_slot_emptied_while_the_stride_is_walked_is_passed_over(table: SlotTable) -> None:
    for slot in (3, 4, 5):
        table.handles[slot] = 9
    walk = table.occupied(0, COUNT)
    assert next(walk) == 3
    table.handles[4] = 0
    assert list(walk) == [5]


def test_another_table_over_the_region_is_the_same_table() -> None:
    region = Region("slots", COUNT * SLOT_BYTES)
    one, other = SlotTable(COUNT, region), SlotTable(COUNT, region)
    one.handles[17] = 42
    assert other.handles[17] == 42
    assert list(other.occupied(0, COUNT)) == [17]
    region.close()


def test_a_region_is_whole_memory_pages_of_zeros_that_are_not_there_yet() -> None:
    region = Region("slots", 5000)
    assert (region.size_bytes, len(region.view), len(region.words())) == (8192, 8192, 1024)
    assert region.resident_bytes() == 0
    region.view[0] = 1
    assert region.resident_bytes() == 4096
    region.close()
