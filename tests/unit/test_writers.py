"""The number of writers: found by trial on played disks, and left alone where nothing is gained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmemfs.policy.writers import FIRST_PAUSE_S, LEAST_BYTES, LEAST_S, LONGEST_PAUSE_S, Writers, after
from tmemfs.units import MIB, SEGMENT_BYTES

MOST = 3
STEP_S = 0.5

Disk = Callable[[int], float]


def volume(latency_s: float, rate: float) -> Disk:
    """Bytes per second that `count` writers reach: each waits for the latency of its write, and all share the rate."""
    return lambda count: min(rate, count * SEGMENT_BYTES / (latency_s + SEGMENT_BYTES / rate))


CLOUD = volume(latency_s=0.02, rate=250e6)
LIMITED = volume(latency_s=0.0005, rate=20e6)
#: As a file on ext4: all but one writer are at the disk at once.
FILE_IN_A_CLOUD: Disk = lambda count: CLOUD(max(count - 1, 1))  # noqa: E731
ORDINARY = volume(latency_s=0.00001, rate=1500e6)


def played(disk: Disk, seconds: float, start: int = 1) -> list[tuple[float, int]]:
    """The number of writers over time, in steps of STEP_S."""
    writers, now, found = Writers.first(1, MOST, start), 100.0, list[tuple[float, int]]()
    while now < 100 + seconds:
        found.append((now, writers.count))
        now += STEP_S
        writers = after(writers, int(disk(writers.count) * STEP_S), STEP_S, now)
    return found


def mean(found: list[tuple[float, int]]) -> float:
    return sum(count for _, count in found) / len(found)


@pytest.mark.parametrize("disk", [CLOUD, FILE_IN_A_CLOUD], ids=["device", "file"])
def test_a_disk_with_long_latency_gets_all_writers_within_seconds(disk: Disk) -> None:
    found = played(disk, 60)
    assert next(now for now, count in found if count == MOST) <= 100 + 3 * (FIRST_PAUSE_S + 2 * STEP_S)
    assert mean(found[len(found) // 2 :]) > MOST - 0.2


@pytest.mark.parametrize("disk", [LIMITED, ORDINARY], ids=["limited", "ordinary"])
@pytest.mark.parametrize("start", [1, 2])
def test_a_disk_that_gains_nothing_gets_one_writer_and_is_hardly_asked(disk: Disk, start: int) -> None:
    found = played(disk, 600, start)
    assert mean(found[len(found) // 2 :]) < 1.02


def test_a_disk_that_changes_is_found_out() -> None:
    writers, now = Writers.first(1, MOST, 1), 0.0
    for disk in (CLOUD, LIMITED, CLOUD):
        for _ in range(int(4 * LONGEST_PAUSE_S / STEP_S)):
            now += STEP_S
            writers = after(writers, int(disk(writers.count) * STEP_S), STEP_S, now)
        assert writers.settled == (MOST if disk is CLOUD else 1)


def test_a_step_is_too_short_to_tell() -> None:
    first = Writers.first(1, MOST, 1)
    assert after(first, LEAST_BYTES - 1, 60, 60).count == after(first, 1 << 40, LEAST_S / 2, 60).count == 1
    assert after(first, LEAST_BYTES, LEAST_S, 60).count == MOST


def test_where_there_is_no_choice_there_is_no_trial() -> None:
    writers = Writers.first(2, 2, 2)
    for now in range(100):
        writers = after(writers, 100 * MIB, 1, now)
        assert writers.count == 2


@given(st.lists(st.tuples(st.integers(0, 1 << 32), st.floats(0, 100)), max_size=200), st.integers(1, MOST))
def test_the_number_stays_within_its_bounds_whatever_is_measured(samples: list[tuple[int, float]], start: int) -> None:
    writers, now = Writers.first(1, MOST, start), 0.0
    for written, seconds in samples:
        now += seconds
        writers = after(writers, written, seconds, now)
        assert 1 <= writers.count <= MOST and 1 <= writers.settled <= MOST
