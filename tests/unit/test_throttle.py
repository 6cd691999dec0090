"""Throttle: how long work in the background lets go, by what is asked of the store meanwhile."""

from __future__ import annotations

import time

import pytest

from tests.parts import new_tmem
from tmemfs.jobs.throttle import BUSY_S, IDLE_S, STEPS, Throttle
from tmemfs.store.ledger import ONLY_POOL, STORES
from tmemfs.store.tmem import Tmem


@pytest.fixture
def tmem() -> Tmem:
    return new_tmem()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The sleeps, on a clock that they move, and nothing else."""
    found, now = list[float](), [100.0]

    def sleep(seconds: float) -> None:
        found.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return found


@pytest.fixture
def throttle(tmem: Tmem, slept: list[float]) -> Throttle:
    """One for which the store has been quiet for a while."""
    found = Throttle(tmem)
    repeat(found, 1000)
    slept.clear()
    return found


def repeat(throttle: Throttle, steps: int) -> None:
    for _ in range(steps):
        throttle()


def test_in_a_quiet_store_it_is_short_and_seldom(throttle: Throttle, slept: list[float]) -> None:
    repeat(throttle, 10 * STEPS)
    assert slept == [IDLE_S] * 10


@pytest.mark.parametrize("counter", ["loads_ram", "loads_disk", "stores"])
def test_with_requests_every_step_is_followed_by_a_long_one(
    throttle: Throttle, tmem: Tmem, slept: list[float], counter: str
) -> None:
    for _ in range(10):
        if counter == "stores":
            tmem.ledger.counters[ONLY_POOL][STORES] += 1
        else:
            setattr(tmem.counts, counter, getattr(tmem.counts, counter) + 1)
        throttle()
    assert slept == [BUSY_S] * 10


def test_after_the_last_request_another_is_expected_for_a_while_only(throttle: Throttle, tmem: Tmem, slept: list[float]) -> None:
    tmem.counts.loads_ram += 1
    repeat(throttle, 1000)
    assert slept[:200] == [BUSY_S] * 200 and slept[-5:] == [IDLE_S] * 5


def test_what_somebody_waits_for_does_not_wait_for_requests(throttle: Throttle, tmem: Tmem, slept: list[float]) -> None:
    with throttle.hurry():
        for _ in range(2 * STEPS):
            tmem.counts.loads_ram += 1
            throttle()
    assert slept == [IDLE_S] * 2
    throttle()
    assert slept[-1] == BUSY_S
