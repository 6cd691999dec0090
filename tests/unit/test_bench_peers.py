"""The comparison with peers, its pure parts: counters parsed, rounds compared, goals judged, tables written."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from tmemfs.units import MIB
from tools.bench import goals
from tools.bench.accounts import (
    DiskCounters,
    Usage,
    parse_diskstats,
    parse_flat,
    parse_mm_stat,
    parse_stat_cpu_s,
    parse_stat_name,
    parse_stat_parent,
)
from tools.bench.contenders import parse_choices
from tools.bench.peers import pages_file
from tools.bench.programs import direction_figures, parse_stress
from tools.bench.statistics import Goal, Sample, Spread, judge, percentile, spread
from tools.bench.toucher import parse_answer
from tools.bench.workloads import Overcommit

DISKSTATS = """\
   7       0 loop0 2086104 561510 21321968 161014 942926 5066192 48072368 1556858 0 234984 1723595 10573 0 319835584 5663 72 58
 254       0 vda 10 1 80 5 3 0 16 7 0 9 12 157714 42 322589488 37408 2012 65
"""
STAT = "77 (a (b) c) S 2 0 0 0 -1 69238880 0 0 0 0 150 50 0 0 20 0 1 0 12 0 0"


def sample(number: int, contender: str, workload: str, **figures: float) -> Sample:
    return Sample(number, contender, workload, figures)


def usage(wall_s: float, disk: DiskCounters, **swapped: int) -> Usage:
    return Usage(wall_s, wall_s, 0.0, 0.0, 0.0, disk, swapped)


def test_diskstats_are_found_by_number_and_given_in_bytes() -> None:
    assert parse_diskstats(DISKSTATS, "254:0") == DiskCounters(10, 80 * 512, 3, 16 * 512)
    assert parse_diskstats(DISKSTATS, "254:1") == DiskCounters()


def test_stat_of_a_process_survives_brackets_in_its_name() -> None:
    assert parse_stat_cpu_s(STAT, ticks=100) == 2.0
    assert parse_stat_parent(STAT) == 2
    assert parse_stat_name(STAT) == "a (b) c"


def test_mm_stat_of_zram_old_and_new() -> None:
    assert parse_mm_stat("  4096 1000 8192 0 9000 1 0\n")["ram_bytes"] == 8192
    assert parse_mm_stat("  4096 1000 8192 0 9000 1 0 5 6\n")["huge_pages"] == 5


def test_flat_keys_leave_out_what_is_no_number() -> None:
    assert parse_flat("codec lz4\nstores 5\nnr 1 2\n") == {"stores": 5}


def test_cpu_of_kworkers_is_that_of_those_that_are_there() -> None:
    """One has ended meanwhile, one has come, and one has the number of another."""
    before = replace(usage(0.0, DiskCounters()), each_kworker_s={1: 5.0, 2: 7.0, 3: 1.0})
    now = replace(usage(1.0, DiskCounters()), each_kworker_s={1: 5.5, 3: 0.25, 4: 0.125})
    assert now.since(before).kworkers_s == 0.5 + 0.25 + 0.125


def test_a_working_set_is_made_for_its_pool() -> None:
    one = Overcommit.of(240 * MIB, ratio=2.0, times=3)
    assert one.set_bytes == 240 * MIB * 4 * 2 and one.limit_bytes == 640 * MIB and one.swap_bytes > 2 * one.set_bytes


def test_choices_give_the_chosen_first() -> None:
    assert parse_choices("lzo-rle [lz4] lzo\n") == ["lz4", "lzo-rle", "lzo"]


def test_pages_that_zswap_passes_on_are_counted_once() -> None:
    before = usage(1.0, DiskCounters(1, 10, 1, 10), pswpin=5, pswpout=5, zswpin=0, zswpout=0, zswpwb=0)
    after = usage(3.0, DiskCounters(3, 30, 2, 40), pswpin=15, pswpout=25, zswpin=3, zswpout=30, zswpwb=18)
    used = after.since(before)
    assert used.wall_s == 2.0 and used.disk == DiskCounters(2, 20, 1, 30) and used.disk.bytes == 50
    assert used.pages_in == 13
    assert used.pages_out == 32  # 30 into zswap, 2 past it; 18 of the device's 20 came out of zswap


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 5), (90, 9), (99, 10), (99.9, 10), (100, 10)])
def test_a_percentile_is_a_value_that_occurred(percent: float, value: int) -> None:
    assert percentile(range(1, 11), percent) == value


def test_a_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError):
        percentile([], 50)


def test_a_spread_is_median_and_extremes() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert spread([]) is None


def test_a_goal_is_judged_round_by_round() -> None:
    goal = Goal("g", ("a", "w", "f"), ("b", "w", "f"), 1.0)
    samples = [sample(0, "a", "w", f=1), sample(0, "b", "w", f=2), sample(1, "a", "w", f=30), sample(1, "b", "w", f=20)]
    samples += [sample(2, "a", "w", f=1000), sample(3, "a", "w", f=9), sample(3, "b", "w", f=10)]
    verdict = judge(goal, samples)
    assert verdict.ratio == Spread(0.9, 0.5, 1.5, 3)  # round 2 has no other half
    assert verdict.is_met is True


def test_a_goal_is_not_rounded_up() -> None:
    goal = Goal("g", ("a", "w", "f"), ("b", "w", "f"), 2.0, at_least=True)
    assert judge(goal, [sample(0, "a", "w", f=1.99999), sample(0, "b", "w", f=1)]).is_met is False


def test_a_goal_without_figures_is_not_measured() -> None:
    verdict = judge(Goal("g", ("a", "w", "f"), ("b", "w", "f"), 1.0), [sample(0, "a", "w", f=1), sample(0, "b", "w", f=0)])
    assert verdict.is_met is None
    assert "| - | - | - | - | not measured |" in goals.goal_table([verdict])


def test_every_zswap_compressor_is_a_goal_of_its_own() -> None:
    names = [one.against[0] for one in goals.goals(["zswap-lzo", "zswap-zstd"])]
    assert names.count("zswap-lzo") == names.count("zswap-zstd") == 9


def test_the_table_says_met_and_not_met() -> None:
    good = Goal("good", ("a", "w", "f"), ("b", "w", "f"), 2.0)
    bad = Goal("bad", ("a", "w", "f"), ("b", "w", "f"), 1.0)
    samples = [sample(0, "a", "w", f=3.0), sample(0, "b", "w", f=2.0)]
    table = goals.goal_table([judge(good, samples), judge(bad, samples)])
    assert "| good | <= 2 | 1.500 | 1.500 to 1.500 | 3.00 | 2.00 | met |" in table
    assert "| bad | <= 1 | 1.500 | 1.500 to 1.500 | 3.00 | 2.00 | **not met** |" in table


def test_the_tables_of_contenders_have_a_dash_for_what_was_not_measured() -> None:
    samples = [sample(0, "plain", "ram", p50_us=41.26), sample(0, "plain", "overcommit-3-zipf", touches_per_s=12345.6)]
    assert "| plain | 41.3 | - |" in goals.contender_table(samples, ["plain"])
    assert "| 3 x, zipf | plain | 12,346 | - |" in goals.overcommit_table(samples)
    assert goals.fio_table([sample(0, "tmemfs", "fio-randread-4k-1-0%", iops=5.0)]).endswith("| randread-4k-1-0% | 5.00 |\n")


def test_answers_of_the_toucher_and_of_programs() -> None:
    assert parse_answer("ns 5 wrong 0\n") == {"ns": 5, "wrong": 0}
    line = "stress-ng: info:  [9] vm      1234      5.01      1.00      9.00      246.3      123.4\n"
    assert parse_stress("stress-ng: info:  [9] stressor  bogo ops real time\n" + line, "vm") == 246.3
    with pytest.raises(ValueError):
        parse_stress("stress-ng: nothing of vm, with words enough for it", "vm")
    direction = {"bw_bytes": 2e6, "iops": 500.0, "clat_ns": {"percentile": {"50.000000": 1500, "99.000000": 9000}}}
    assert direction_figures(direction) == {"mb_per_s": 2.0, "iops": 500.0, "p50_us": 1.5, "p99_us": 9.0}


@pytest.mark.parametrize("content", [None, b"", b"half a page"])
def test_only_whole_pages_can_be_swapped(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "some.pages"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(argparse.ArgumentTypeError, match="make some with 'sudo make corpus'"):
        pages_file(str(file))


def test_a_file_of_pages_can_be_swapped(tmp_path: Path) -> None:
    file = tmp_path / "some.pages"
    file.write_bytes(bytes(8192))
    assert pages_file(str(file)) == file
