"""The blocks of a file: kept by several writes at once, changed by one thread while there are none."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

import pytest

from tests.waiting import HANG_S, wait_until
from tmemfs.tiers.blocks import Blocks


class Holder:
    """A thread that has the blocks until it is told to end."""

    def __init__(self, held: AbstractContextManager[None]) -> None:
        self.has_it, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold, args=(held,), daemon=True)
        self._thread.start()

    def _hold(self, held: AbstractContextManager[None]) -> None:
        with held:
            self.has_it.set()
            assert self._end.wait(HANG_S)

    def end(self) -> None:
        self._end.set()
        self._thread.join(HANG_S)


def got(held: AbstractContextManager[None]) -> Holder:
    holder = Holder(held)
    assert holder.has_it.wait(HANG_S)
    return holder


@pytest.fixture
def blocks() -> Blocks:
    return Blocks()


def test_several_writes_keep_it_at_once(blocks: Blocks) -> None:
    writes = [got(blocks.kept()) for _ in range(3)]
    for write in writes:
        write.end()


def test_a_change_waits_for_all_writes_and_goes_before_those_that_come_after_it(blocks: Blocks) -> None:
    writes = [got(blocks.kept()) for _ in range(2)]
    change = Holder(blocks.changed())
    wait_until(lambda: blocks._changes)
    late = Holder(blocks.kept())
    writes[0].end()
    assert not change.has_it.is_set() and not late.has_it.is_set()
    writes[1].end()
    assert change.has_it.wait(HANG_S) and not late.has_it.is_set()
    change.end()
    assert late.has_it.wait(HANG_S)
    late.end()


def test_one_change_is_made_at_a_time(blocks: Blocks) -> None:
    first, second = got(blocks.changed()), Holder(blocks.changed())
    wait_until(lambda: blocks._changes == 2)
    assert not second.has_it.is_set()
    first.end()
    assert second.has_it.wait(HANG_S)
    second.end()


def test_a_failed_write_and_a_failed_change_leave_it_free(blocks: Blocks) -> None:
    for held in (blocks.kept, blocks.changed):
        with pytest.raises(OSError, match="injected"), held():
            raise OSError("injected")
    got(blocks.changed()).end()
    got(blocks.kept()).end()
