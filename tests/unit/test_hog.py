"""The hog that churns: it finds a wrong byte, and knows that what it freed is zero."""

from __future__ import annotations

import io
import json
from random import Random

import pytest

from tests.parts import page_of
from tmemfs.cli.real_pages import RealPages
from tmemfs.units import PAGE_BYTES
from tools.hog import Churned, churn

PAGES = 256


class Pages(RealPages):
    """Random pages, for which no interpreter is started."""

    def __init__(self) -> None:
        pass

    def page(self, number: int) -> bytes:
        return page_of("raw", number)


@pytest.fixture
def pages() -> Churned:
    return Churned(PAGES, Pages(), Random(1))


def test_what_was_filled_is_right_until_a_byte_changes(pages: Churned) -> None:
    assert (pages.fill(), pages.fill(), pages.verify()) == (PAGES, 0, 0)
    pages._memory[7 * PAGE_BYTES + 100] ^= 1
    assert pages.verify() == 1


def test_what_was_freed_is_zero_and_filled_with_other_pages(pages: Churned) -> None:
    pages.fill()
    before = bytes(pages._memory)
    freed = pages.free(0.2)
    assert freed >= 0.2 * PAGES and pages.verify() == 0
    assert sum(not any(pages._memory[at : at + PAGE_BYTES]) for at in range(0, len(before), PAGE_BYTES)) == freed
    assert (pages.fill(), pages.verify()) == (freed, 0)
    assert bytes(pages._memory) != before


def test_a_freed_page_that_comes_back_is_wrong(pages: Churned) -> None:
    pages.fill()
    pages.free(0.2)
    freed = next(at for at in range(PAGES) if not any(pages._memory[at * PAGE_BYTES : (at + 1) * PAGE_BYTES]))
    pages._memory[freed * PAGE_BYTES : (freed + 1) * PAGE_BYTES] = page_of("raw", freed)
    assert pages.verify() == 1


def test_the_last_round_verifies_everything_and_frees_nothing(
    pages: Churned, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("select.select", lambda *_: ([0], [], []))
    assert churn(pages, 0.2) == 0
    assert json.loads(capsys.readouterr().out) == {"verified": PAGES, "wrong": 0, "filled": PAGES, "freed": 0}
