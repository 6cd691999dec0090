"""The pressure controller on recorded pressure: what guests of 512 MiB asked of the pool (tests/traces/pressure), played again.

A trace says how much headroom there would be with an empty pool, and what was swapped out; pages compress to half, and the disk
takes 100 MB/s. The controller samples every 10 ms, as the daemon does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from tmemfs.policy.pressure_controller import RELAXED, Decision, Sample, Settings, decide
from tmemfs.units import MIB, PAGE_BYTES
from tools.vm.pressure_trace import demands

TRACES = Path(__file__).parents[1] / "traces" / "pressure"
RAM = 473 * MIB
SETTINGS = Settings(RAM // 16, 5 * MIB)
TOP = RAM * 6 // 10
RATIO = 2
DISK_BYTES_PER_S = 100 * MIB
SAMPLE_S = 0.01


@dataclass
class Played:
    """What came of a trace: the pool and the headroom at each sample, in bytes."""

    pools: list[float] = field(default_factory=list)
    headrooms: list[float] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    released: float = 0.0


def play(name: str, is_on: bool = True) -> Played:
    """Play the trace `name`."""
    played, pool, found = Played(), 0.0, Decision()
    for at, demand, stored in samples(name):
        pool += stored
        sample = Sample(at, int(demand - pool), int(pool), TOP, int(played.released), 0, int(played.released))
        found = decide(found, sample, SETTINGS) if is_on else found
        goes = min(max(pool - min(found.ceiling, TOP), 0.0), DISK_BYTES_PER_S * SAMPLE_S)
        pool -= goes
        played.released += goes
        played.pools.append(pool)
        played.headrooms.append(demand - pool)
        played.states.append(found.state)
    return played


def samples(name: str) -> Iterator[tuple[float, float, float]]:
    """Seconds, headroom with an empty pool, and bytes stored since the sample before, every SAMPLE_S."""
    rows = [tuple(map(float, line.split())) for line in (TRACES / f"{name}.trace").read_text().splitlines()]
    for (at, headroom, out), (next_at, next_headroom, next_out) in pairwise(rows):
        steps = max(round((next_at - at) / SAMPLE_S), 1)
        for step in range(steps):
            demand = (headroom + (next_headroom - headroom) * step / steps) * 1024
            yield at + step * SAMPLE_S, demand, (next_out - out) / steps * PAGE_BYTES / RATIO


def test_a_program_that_locked_nearly_all_memory_would_have_got_it_again() -> None:
    played = play("growth")
    assert max(played.pools) > 0.4 * RAM
    assert min(played.headrooms) > 0
    assert played.pools[-1] < 16 * MIB and played.headrooms[-1] > SETTINGS.reserve_bytes / 2


def test_without_the_controller_it_would_not() -> None:
    assert min(play("growth", is_on=False).headrooms) < -100 * MIB


@pytest.mark.parametrize("name", ["growth", "stress"])
def test_the_pool_does_not_flap(name: str) -> None:
    """It changes its direction a few times a minute, not with every sample."""
    played = play(name)
    assert turns(played.pools, 0.1) <= len(played.pools) * SAMPLE_S / 5


def test_where_two_programs_want_more_than_there_is_the_pool_keeps_giving() -> None:
    played = play("stress")
    assert min(played.headrooms[len(played.headrooms) // 4 :]) > 0
    assert played.released > 100 * MIB


def turns(values: list[float], share: float) -> int:
    """How often `values` turned round after having changed by `share` of their largest."""
    found, low, high, rises = 0, math.inf, -math.inf, True
    step = share * max(values)
    for value in values:
        low, high = min(low, value), max(high, value)
        if rises and value < high - step:
            found, rises, low = found + 1, False, value
        elif not rises and value > low + step:
            found, rises, high = found + 1, True, value
    return found


def test_a_trace_is_the_room_without_the_pool() -> None:
    kernel = '{"at": %f, "MemAvailable": 1048576, "Active(anon)": 2097152, "Inactive(anon)": 0, "SwapFree": 1048576, "pswpout": %d}'
    lines = [kernel % (5.0, 100), kernel % (6.0, 107), '{"at": 5.1, "pool": 1024}', '{"at": 6.1, "pool": 2048}']
    assert list(demands(lines)) == ["0.00 1537 0", "1.00 1538 7"]


def test_a_quiet_pool_stays_relaxed_at_the_start_of_each_trace() -> None:
    assert {play(name).states[0] for name in ("growth", "stress")} == {RELAXED}
