"""Requests of single pages while damage is not acknowledged."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.waiting import HANG_S
from tmemfs.jobs.executor import Executor
from tmemfs.jobs.single_pages import SinglePages
from tmemfs.store.damage import Damage
from tmemfs.system import swapdev


class Queues:
    """The queues of loop devices: what `nomerges` is of each."""

    def __init__(self) -> None:
        self.no_merges = {"/dev/loop3": "0", "/dev/loop5": "1"}
        self.changed = 0

    def set(self, device: str, value: str) -> str:
        """As swapdev.set_no_merges."""
        if device not in self.no_merges:
            raise OSError(errno.ENOENT, "removed")
        before, self.no_merges[device] = self.no_merges[device], value
        self.changed += 1
        return before


@pytest.fixture
def queues() -> Queues:
    return Queues()


@pytest.fixture
async def damage(nursery: trio.Nursery, queues: Queues) -> AsyncIterator[Damage]:
    damage, executor = Damage(), Executor("test")
    nursery.start_soon(SinglePages(damage, executor, lambda: list(queues.no_merges), queues.set).run)
    await trio.testing.wait_all_tasks_blocked()
    yield damage
    nursery.cancel_scope.cancel()
    executor.close()


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(HANG_S):
        while not condition():
            await trio.sleep(0.005)


async def test_requests_are_merged_again_once_damage_is_acknowledged(damage: Damage, queues: Queues) -> None:
    assert queues.no_merges == {"/dev/loop3": "0", "/dev/loop5": "1"}
    await trio.to_thread.run_sync(damage.note_record, 1, 64, "on_tier")
    await until(lambda: queues.no_merges == {"/dev/loop3": "2", "/dev/loop5": "2"})
    damage.acknowledge()
    await until(lambda: queues.no_merges == {"/dev/loop3": "0", "/dev/loop5": "1"})
    damage.note_failed_read()
    await until(lambda: queues.no_merges == {"/dev/loop3": "2", "/dev/loop5": "2"})


async def test_a_device_is_set_once_however_much_is_damaged(damage: Damage, queues: Queues) -> None:
    for offset in range(100):
        damage.note_record(1, offset, "in_ram")
        await trio.sleep(0)
    await until(lambda: queues.changed == 2)
    damage.acknowledge()
    await until(lambda: queues.changed == 4)
    assert queues.no_merges == {"/dev/loop3": "0", "/dev/loop5": "1"}


async def test_a_device_that_is_gone_is_forgotten(damage: Damage, queues: Queues) -> None:
    damage.note_failed_read()
    await until(lambda: queues.changed == 2)
    del queues.no_merges["/dev/loop3"]
    damage.acknowledge()
    await until(lambda: queues.no_merges == {"/dev/loop5": "1"})
    damage.note_failed_read()
    await until(lambda: queues.no_merges == {"/dev/loop5": "2"})


def test_the_setting_of_a_queue_is_written_only_if_it_changes(tmp_path: Path) -> None:
    queue = tmp_path / "loop7" / "queue"
    queue.mkdir(parents=True)
    (queue / "nomerges").write_text("0\n")
    assert swapdev.set_no_merges("/dev/loop7", "2", tmp_path) == "0"
    assert (queue / "nomerges").read_text() == "2"
    os.utime(queue / "nomerges", (0, 0))
    assert swapdev.set_no_merges("/dev/loop7", "2", tmp_path) == "2"
    assert (queue / "nomerges").stat().st_mtime == 0
    with pytest.raises(FileNotFoundError):
        swapdev.set_no_merges("/dev/loop8", "2", tmp_path)
