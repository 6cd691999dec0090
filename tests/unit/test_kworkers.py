"""Which of the kernel's threads are given priority, and that it is taken again. No thread of this machine is touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tmemfs.host.kworkers import KernelWorkers

Changes = list[tuple[int, int, int]]


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> Changes:
    """(pid, policy, priority) of every change."""
    found: Changes = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda pid, policy, param: found.append((pid, policy, param.sched_priority)))
    return found


def threads(proc: Path, names: dict[int, str]) -> None:
    """A /proc whose kernel has threads of these names."""
    (proc / "2/task/2").mkdir(parents=True, exist_ok=True)
    (proc / "2/task/2/children").write_text("".join(f"{pid} " for pid in names))
    for pid, name in names.items():
        (proc / str(pid)).mkdir(exist_ok=True)
        (proc / str(pid) / "comm").write_text(f"{name}\n")


@pytest.mark.parametrize("name", ["kworker/u4:0", "kworker/u8:12-loop0", "kworker/u4:1+loop7", "kworker/u129:3-events_unbound"])
def test_unbound_workers_get_the_lowest_real_time_priority(tmp_path: Path, changes: Changes, name: str) -> None:
    threads(tmp_path, {40: name})
    KernelWorkers(tmp_path).give_priority()
    assert changes == [(40, os.SCHED_RR, 1)]


@pytest.mark.parametrize("name", ["kworker/0:1-events", "kworker/R-writeback", "kswapd0", "kworker/1:0H"])
def test_no_other_thread_does(tmp_path: Path, changes: Changes, name: str) -> None:
    threads(tmp_path, {40: name})
    KernelWorkers(tmp_path).give_priority()
    assert not changes


def test_only_new_ones_are_looked_at_again(tmp_path: Path, changes: Changes) -> None:
    workers = KernelWorkers(tmp_path)
    threads(tmp_path, {40: "kworker/u4:0"})
    workers.give_priority()
    threads(tmp_path, {40: "kworker/u4:0", 41: "kworker/u4:1"})
    workers.give_priority()
    assert [pid for pid, _, _ in changes] == [40, 41] and workers.raised == 2


def test_all_that_are_still_there_lose_it_again(tmp_path: Path, changes: Changes) -> None:
    workers = KernelWorkers(tmp_path)
    threads(tmp_path, {40: "kworker/u4:0", 41: "kworker/u4:1"})
    workers.give_priority()
    threads(tmp_path, {41: "kworker/u4:1"})
    workers.give_priority()
    changes.clear()
    workers.take_priority()
    assert changes == [(41, os.SCHED_OTHER, 0)] and not workers.raised
    workers.give_priority()
    assert changes[1:] == [(41, os.SCHED_RR, 1)]


def test_without_the_right_or_a_kernel_that_tells_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, policy: int, param: os.sched_param) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    workers = KernelWorkers(tmp_path)
    workers.give_priority()
    threads(tmp_path, {40: "kworker/u4:0"})
    workers.give_priority()
    workers.take_priority()
    assert not workers.raised
