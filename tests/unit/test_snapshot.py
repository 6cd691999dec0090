"""Figures that belong together are of one moment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tmemfs.observe import snapshot
from tmemfs.system.memory import Resident, resident_bytes


def read(monkeypatch: pytest.MonkeyPatch, frames: list[int]) -> tuple[Resident, int]:
    """The resident memory and the pool's, with the pool as large as `frames` say, one after each of the readings."""
    left: Iterator[int] = iter(frames)
    now = 0

    def pool() -> int:
        nonlocal now
        now = next(left, now)
        return now

    arena = SimpleNamespace(region=SimpleNamespace(resident_bytes=pool))
    services: Any = SimpleNamespace(
        engine=SimpleNamespace(tmem=SimpleNamespace(arena=arena)), pressure=None, daemon_pid=os.getpid()
    )
    monkeypatch.setattr(snapshot, "resident_bytes", lambda pid: Resident(anon=5, file=7, shmem=now))
    taken = snapshot.Snapshot(services)
    return taken.resident, taken.pool_resident


def test_frames_that_are_released_between_two_readings_are_in_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    resident, pool = read(monkeypatch, [30, 20, 10])
    assert resident.shmem == pool == 10


def test_a_pool_that_never_rests_is_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, list(range(100, 0, -1)))[1] > 0


def test_a_process_that_has_ended_and_is_not_waited_for_has_no_memory() -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    try:
        with pytest.raises(ProcessLookupError):
            resident_bytes(child)
    finally:
        os.waitpid(child, 0)
