"""The pool's order of victims on recorded workloads (tests/traces): second chance (`next_victim`), held against oldest first.

Pages that oldest first reads from disk, and what second chance reads beyond that, in pools that hold a share of the segments
which the workload fills at its peak:

    trace         1/8             1/4             3/8             1/2             5/8             3/4
    compile     5334  -0.2%     2924  -2.7%     2167  -1.4%     1982  -1.0%     1718  -3.7%     1607 -12.5%
    database    6814  -2.0%     3586  +5.5%     3096  -1.5%     2594  -2.3%      991  -0.1%      788  -0.5%
    mypy       11315  -0.5%     6144  -3.5%     4104 +14.7%     2500 -11.1%     1292 -20.5%      758 -24.4%
    sort       24267  +1.4%    17496  +5.2%     9461 +10.4%     4922  -8.8%     1772 -37.0%      299  -1.7%
    all        47730  +0.3%    30150  +2.7%    18828  +8.0%    11998  -6.6%     5773 -17.1%     3452 -11.4%

In all it reads 0.3% more. A single figure says little: the same command, recorded again, may give the opposite sign (sort at
5/8: -37% here, +113% in another recording). Over 24 recordings, 4 to 8 of each command, second chance read 0.5% more: compile
3.7% less, database 1.9% less, mypy 1.8% more, sort 2.9% more. What is asserted is what that comes to: the two are alike.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest

from tmemfs.policy.victims import next_victim
from tools.trace.ahead import Ahead, replay_ahead
from tools.trace.format import LOAD, Request, read
from tools.trace.replay import Outcome, footprint, oldest_first, replay
from tools.trace.summary import summary

TRACES: Final = sorted((Path(__file__).parents[1] / "traces").glob("*.trace"))
SHARES: Final = tuple(Fraction(eighths, 8) for eighths in range(1, 7))
#: How far the two are apart on one trace, over all sizes of the pool.
ALIKE: Final = 0.03
MOST_FILE_BYTES: Final = 150_000
every_trace = pytest.mark.parametrize("file", TRACES, ids=lambda file: file.stem)


@cache
def recorded(file: Path) -> tuple[Request, ...]:
    return tuple(read(file))


@cache
def outcomes(file: Path, share: Fraction) -> tuple[Outcome, Outcome]:
    """Of oldest first and of second chance."""
    requests = recorded(file)
    limit = int(footprint(requests) * share)
    return replay(requests, limit, oldest_first), replay(requests, limit, next_victim)


def loads_disk(*files: Path) -> tuple[int, int]:
    """Pages read from disk by oldest first and by second chance, over all sizes of the pool."""
    pairs = [outcomes(file, share) for file in files for share in SHARES]
    return sum(oldest.loads_disk for oldest, _ in pairs), sum(second.loads_disk for _, second in pairs)


def test_the_traces_are_there() -> None:
    assert {file.stem for file in TRACES} == {"compile", "database", "mypy", "sort"}


@every_trace
def test_a_trace_is_of_a_workload_that_swaps_thousands_of_pages(file: Path) -> None:
    sums = summary(recorded(file))
    assert sums.stores > 10_000 and sums.loads > 10_000
    assert file.stat().st_size < MOST_FILE_BYTES


@every_trace
def test_no_load_is_lost_and_none_made_up(file: Path) -> None:
    totals = {outcome.loads_ram + outcome.loads_disk for share in SHARES for outcome in outcomes(file, share)}
    asked = sum(request.count for request in recorded(file) if request.operation == LOAD)
    assert len(totals) == 1 and 0 < totals.pop() <= asked  # the kernel also reads slots that hold nothing


@every_trace
def test_a_larger_pool_reads_less_from_disk_and_writes_less(file: Path) -> None:
    for policy in (0, 1):
        done = [outcomes(file, share)[policy] for share in SHARES]
        for smaller, larger in pairwise(done):
            assert larger.loads_disk < smaller.loads_disk and larger.written < smaller.written


@every_trace
def test_a_pool_that_holds_all_reads_nothing_from_disk(file: Path) -> None:
    requests = recorded(file)
    assert replay(requests, footprint(requests) + 1, oldest_first).loads_disk == 0


@every_trace
def test_half_of_the_peak_in_ram_spares_most_loads_the_disk(file: Path) -> None:
    oldest, _ = outcomes(file, Fraction(1, 2))
    assert oldest.loads_disk < 0.16 * (oldest.loads_ram + oldest.loads_disk)


@every_trace
def test_second_chance_and_oldest_first_are_alike_on_every_trace(file: Path) -> None:
    oldest, second = loads_disk(file)
    assert abs(second - oldest) < ALIKE * oldest


def test_second_chance_reads_no_less_than_oldest_first_in_all() -> None:
    oldest, second = loads_disk(*TRACES)
    assert oldest <= second < 1.01 * oldest


@every_trace
@pytest.mark.parametrize("share", SHARES, ids=str)
def test_the_order_of_victims_does_not_change_how_many_are_written(file: Path, share: Fraction) -> None:
    oldest, second = outcomes(file, share)
    assert oldest.written == second.written


@every_trace
def test_what_is_written_ahead_needlessly_is_no_more_than_the_share_that_is_clean(file: Path) -> None:
    requests = recorded(file)
    for share in SHARES[1:4]:  # pools that are too small for the workload
        limit = int(footprint(requests) * share)
        done = replay_ahead(requests, limit, share=0.25, rest_us=0)
        without = replay(requests, limit, next_victim).written
        assert done.died_bytes <= done.ahead_bytes and done.written >= without
        # Each time the oldest die, a share of the pool may have been written for nothing; the traces have one such time or two.
        assert done.written - without <= 2 * max(limit // 4, 1) + 2, (share, done, without)


@every_trace
def test_what_dies_before_it_has_rested_is_not_written_ahead(file: Path) -> None:
    requests = recorded(file)
    assert replay_ahead(requests, footprint(requests), share=0.25, rest_us=30e6) == Ahead(0, 0, 0)
