"""The tables of wear, kills, resumed programs and disks."""

from __future__ import annotations

from tools.bench import tables
from tools.bench.accounts import OWN_WEAR, WEAR, DiskCounters
from tools.bench.disk import PROFILES
from tools.bench.disk_watch import Check
from tools.bench.statistics import Sample


def test_the_tables_have_a_column_for_each_contender() -> None:
    samples = [
        Sample(0, "tmemfs", "wear-3", {WEAR: 1600.0, OWN_WEAR: 1500.0}),
        Sample(0, "plain", "wear-3", {WEAR: 4100.0, OWN_WEAR: 4096.0}),
        Sample(0, "tmemfs", "kills-real-sort", {"oom_kills": 1}), Sample(1, "tmemfs", "kills-real-sort", {"oom_kills": 2}),
        Sample(0, "plain", "resume-disk-redis", {"answer_s": 12.5, "swapped_share": 0.9}),
    ]  # fmt: skip
    assert tables.wear_table(samples).splitlines()[2:] == [
        "| wear-3, own count | 1,500 | 4,096 |",
        "| wear-3, the disk's | 1,600 | 4,100 |",
    ]
    assert tables.kills_table(samples).splitlines()[2:] == ["| real-sort | 3 in 2 |"]
    assert tables.resume_table(samples).splitlines()[2].startswith("| disk-redis | plain | 12.5 | - | - | 0.90 |")


def test_the_table_of_the_disk_says_which_limits_did_not_hold() -> None:
    samples = [(float(second), DiskCounters(0, 0, 10 * second, 25_000_000 * second)) for second in range(4)]
    checks = [
        Check.of(0, name, "overcommit", samples, PROFILES[disk].limits) for name, disk in (("plain", "sd"), ("tmemfs", "cloud"))
    ]
    plain, tmemfs = tables.disk_table(checks).splitlines()[2:]
    assert plain == (
        "| overcommit | plain | 0 | 0 | 0.0 | 0 | 75 | 25.0 | 10 | **write_bps 25,000,000 where the limit is 20,000,000** |"
    )
    assert tmemfs.endswith("| held |")
