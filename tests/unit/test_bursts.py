"""When a burst begins and ends, by times that are told."""

from __future__ import annotations

from random import Random

import pytest

from tmemfs.policy.bursts import BURST_PER_S, BURST_REQUESTS, BURST_S, LONGEST_LOOK_S, LOOK_S, Bursts


def began(bursts: Bursts, times: list[float]) -> list[int]:
    """Which of the requests at `times` begin a burst."""
    return [number for number, now in enumerate(times) if bursts.begins(now)]


def test_a_burst_begins_with_the_request_that_completes_it() -> None:
    assert began(Bursts(), [100.0] * BURST_REQUESTS) == [BURST_REQUESTS - 1]


@pytest.mark.parametrize("per_s", [1, 100, 1000, BURST_PER_S * 0.9])
def test_requests_below_the_rate_begin_none_however_long_they_come(per_s: float) -> None:
    assert began(Bursts(), [number / per_s for number in range(10_000)]) == []


def test_a_cluster_per_second_is_no_burst() -> None:
    times = [second + number * 20e-6 for second in range(100) for number in range(BURST_REQUESTS - 1)]
    assert began(Bursts(), times) == []


def test_whatever_the_times_a_burst_begins_where_so_many_requests_are_so_close() -> None:
    rng, now, times = Random(5), 0.0, list[float]()
    for _ in range(5000):
        now += rng.expovariate(BURST_PER_S)
        times.append(now)
    last = BURST_REQUESTS - 1
    assert began(Bursts(), times) == [at for at in range(last, len(times)) if times[at] - times[at - last] <= BURST_S]


def test_a_request_counts_as_often_as_its_weight_says() -> None:
    bursts = Bursts()
    assert not any(bursts.begins(100.0, 2) for _ in range(BURST_REQUESTS // 2 - 1))
    assert bursts.begins(100.0, 2)


def test_it_goes_on_at_half_of_the_rate_at_which_it_began_and_ends_below() -> None:
    bursts = Bursts()
    bursts.begin(1000, 50.0)
    half = BURST_PER_S * LOOK_S / 2
    assert bursts.goes_on(1000 + int(half), 50.0 + LOOK_S)
    assert not bursts.goes_on(1000 + int(half) + int(half) - 1, 50.0 + 2 * LOOK_S)


def test_a_look_that_is_late_counts_by_the_time_that_it_took() -> None:
    bursts = Bursts()
    bursts.begin(0, 50.0)
    assert not bursts.goes_on(100, 51.0)
    assert bursts.goes_on(100 + int(BURST_PER_S), 52.0)


def test_the_longer_a_burst_the_fewer_looks_at_it() -> None:
    bursts = Bursts()
    bursts.begin(0, now := 50.0)
    looks = []
    for number in range(1, 6):
        looks.append(bursts.look_s)
        now += bursts.look_s
        assert bursts.goes_on(number * 1000, now)
    assert looks == [LOOK_S, 2 * LOOK_S, 4 * LOOK_S, 8 * LOOK_S, LONGEST_LOOK_S] and LONGEST_LOOK_S == 8 * LOOK_S
    bursts.begin(9000, 60.0)
    assert bursts.look_s == LOOK_S


def test_a_burst_without_another_request_ends_at_the_first_look() -> None:
    bursts = Bursts()
    bursts.begin(7, 50.0)
    assert not bursts.goes_on(7, 50.0 + LOOK_S)
