"""Which of the kernel's threads are given priority, and that it is taken again. No thread of this machine is touched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.settings_place import ORDINARY, PRIORITY, Machine
from tmemfs.system.kworkers import KernelWorkers


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    with machine.running():
        yield machine


@pytest.fixture
def workers(machine: Machine) -> KernelWorkers:
    return KernelWorkers(machine.root / "proc")


@pytest.mark.parametrize("name", ["kworker/u4:0", "kworker/u8:12-loop0", "kworker/u4:1+loop7", "kworker/u129:3-events_unbound"])
def test_unbound_workers_get_the_lowest_real_time_priority(machine: Machine, workers: KernelWorkers, name: str) -> None:
    machine.threads({40: name})
    workers.give_priority()
    assert machine.scheduling == {40: PRIORITY} and workers.raised == 1


@pytest.mark.parametrize("name", ["kworker/0:1-events", "kworker/R-writeback", "kswapd0", "kworker/1:0H", "kworker/u4:0x"])
def test_no_other_thread_does(machine: Machine, workers: KernelWorkers, name: str) -> None:
    machine.threads({40: name})
    workers.give_priority()
    assert machine.scheduling == {40: ORDINARY} and not workers.raised


@pytest.mark.parametrize(
    "theirs", [(os.SCHED_FIFO, 50), (os.SCHED_RR, 2), (os.SCHED_BATCH, 0), (os.SCHED_RR | os.SCHED_RESET_ON_FORK, 1)]
)
def test_scheduling_that_an_administrator_has_set_stays(machine: Machine, workers: KernelWorkers, theirs: tuple[int, int]) -> None:
    machine.threads({40: "kworker/u4:0"})
    machine.scheduling[40] = theirs
    workers.give_priority()
    assert workers.take_priority() and machine.scheduling == {40: theirs}


def test_new_ones_and_those_that_lost_it_to_another_daemon_get_it_at_the_next_look(
    machine: Machine, workers: KernelWorkers
) -> None:
    machine.threads({40: "kworker/u4:0"})
    workers.give_priority()
    machine.threads({40: "kworker/u4:0", 41: "kworker/u4:1"})
    KernelWorkers(machine.root / "proc").take_priority()
    workers.give_priority()
    assert machine.scheduling == {40: PRIORITY, 41: PRIORITY} and workers.raised == 2


def test_all_that_are_still_there_lose_it_again_also_what_another_daemon_gave(machine: Machine, workers: KernelWorkers) -> None:
    machine.threads({40: "kworker/u4:0", 41: "kworker/u4:1"})
    KernelWorkers(machine.root / "proc").give_priority()
    machine.threads({41: "kworker/u4:1"})
    assert workers.take_priority() and machine.scheduling[41] == ORDINARY and not workers.raised
    workers.give_priority()
    assert machine.scheduling[41] == PRIORITY


def test_those_that_had_it_before_keep_it_and_are_not_counted(machine: Machine, workers: KernelWorkers) -> None:
    machine.threads({40: "kworker/u4:0", 41: "kworker/u4:1"})
    machine.scheduling[41] = PRIORITY
    workers.give_priority(kept=(41,))
    assert workers.raised == 1
    assert workers.take_priority(kept=(41,)) and machine.scheduling == {40: ORDINARY, 41: PRIORITY}


def test_a_number_that_belongs_to_another_thread_now_is_left_alone(machine: Machine, workers: KernelWorkers) -> None:
    machine.threads({40: "kworker/u4:0"})
    workers.give_priority()
    machine.threads({40: "kswapd0"})
    workers.take_priority()
    assert machine.scheduling == {40: PRIORITY}


def test_only_the_names_of_new_ones_are_read_again(
    machine: Machine, workers: KernelWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.threads({40: "kworker/u4:0", 50: "kswapd0"})
    workers.give_priority()
    asked: list[int] = []
    monkeypatch.setattr(KernelWorkers, "_is_unbound", lambda _, pid: asked.append(pid))
    workers.give_priority()
    assert not asked


def test_without_the_right_or_a_kernel_that_tells_nothing_happens(
    machine: Machine, workers: KernelWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("tmemfs.system.kworkers.os.sched_setscheduler", refuse)
    (machine.root / "proc/2/task/2/children").unlink()
    workers.give_priority()
    machine.threads({40: "kworker/u4:0", 41: "kworker/u4:1"})
    machine.scheduling[41] = PRIORITY
    workers.give_priority(kept=(41,))
    assert not workers.raised and workers.take_priority(kept=(41,))
    assert not workers.take_priority()  # one is left with it
