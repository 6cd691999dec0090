"""Pages of a real process: no two alike, and the same whenever they are asked for."""

from __future__ import annotations

import pytest

from tmemfs.cli.real_pages import RealPages, heap_pages
from tmemfs.units import PAGE_BYTES


@pytest.fixture(scope="module")
def supply() -> RealPages:
    return RealPages(seed=1)


def test_heap_pages_are_whole_different_and_not_zero() -> None:
    pages = heap_pages(64)
    assert 0 < len(pages) <= 64
    assert {len(page) for page in pages} == {PAGE_BYTES}
    assert len(set(pages)) == len(pages)
    assert bytes(PAGE_BYTES) not in pages


def test_a_page_is_the_same_whenever_it_is_asked_for(supply: RealPages) -> None:
    assert [supply.page(number) for number in range(8)] == [supply.page(number) for number in range(8)]


def test_no_two_pages_are_alike_however_many_are_wanted(supply: RealPages) -> None:
    numbers = [*range(64), *range(1 << 20, (1 << 20) + 64), *range(0, 1 << 24, 1 << 18)]
    pages = {supply.page(number) for number in numbers}
    assert len(pages) == len(set(numbers))
    assert {len(page) for page in pages} == {PAGE_BYTES}


def test_a_page_has_its_number_and_the_seed_in_it(supply: RealPages) -> None:
    assert (12345).to_bytes(8, "little") + (1).to_bytes(8, "little") in supply.page(12345)
