"""Limits of a disk: how the controller is told them, what it had before, and whether they held."""

from __future__ import annotations

from pathlib import Path

import pytest

from tmemfs.errors import Refused
from tools.bench.accounts import DiskCounters
from tools.bench.disk import PROFILES, DiskLimits, whole_disk
from tools.bench.disk_watch import SPAN_S, Check, DiskWatch, Moment, excess, highest_rates
from tools.bench.settings import Settings

THROTTLES = ("read_iops", "write_iops", "read_bps", "write_bps")
DISK = "254:0"


@pytest.fixture
def first_version(tmp_path: Path) -> Path:
    """A root of cgroup v1, where one limit of the disk and one of another are set."""
    place = tmp_path / "v1"
    (place / "blkio").mkdir(parents=True)
    for name in THROTTLES:
        (place / "blkio" / f"blkio.throttle.{name}_device").write_text("")
    (place / "blkio" / "blkio.throttle.read_bps_device").write_text("7:3 500\n254:0 1234\n")
    return place


@pytest.fixture
def second_version(tmp_path: Path) -> Path:
    """A root of cgroup v2 with two groups, one of which has a limit of the disk."""
    place = tmp_path / "v2"
    for name, text in (("system.slice", "254:0 rbps=9 wbps=max riops=max wiops=max\n"), ("user.slice", "")):
        (place / name).mkdir(parents=True)
        (place / name / "io.max").write_text(text)
    return place


def moments(*rates: tuple[float, DiskCounters]) -> list[Moment]:
    """Samples from the lengths of spans and what was done in each."""
    at, reads, read, writes, written = 0.0, 0, 0, 0, 0
    found = [(at, DiskCounters())]
    for seconds, done in rates:
        at, reads, read = at + seconds, reads + done.reads, read + done.read_bytes
        writes, written = writes + done.writes, written + done.written_bytes
        found.append((at, DiskCounters(reads, read, writes, written)))
    return found


def test_a_limit_of_the_first_version_is_a_line_in_a_file_for_each(first_version: Path) -> None:
    changes = {one.file.name: (one.during, one.after) for one in DiskLimits(PROFILES["sd"], DISK, first_version).changes()}
    assert changes == {
        "blkio.throttle.read_iops_device": ("254:0 1500", "254:0 0"),
        "blkio.throttle.read_bps_device": ("254:0 40000000", "254:0 1234"),
        "blkio.throttle.write_bps_device": ("254:0 20000000", "254:0 0"),
    }


def test_a_limit_of_the_second_version_is_that_of_each_group(second_version: Path) -> None:
    changes = {
        one.file.parent.name: (one.during, one.after) for one in DiskLimits(PROFILES["cloud"], DISK, second_version).changes()
    }
    during = "254:0 riops=3000 wiops=3000 rbps=125000000 wbps=125000000"
    assert changes == {
        "system.slice": (during, "254:0 rbps=9 wbps=max riops=max wiops=max"),
        "user.slice": (during, "254:0 riops=max wiops=max rbps=max wbps=max"),
    }


def test_a_group_that_is_made_meanwhile_is_limited_once(second_version: Path) -> None:
    limits = DiskLimits(PROFILES["sd"], DISK, second_version)
    later = second_version / "tmemfs-bench-1" / "io.max"
    later.parent.mkdir()
    later.write_text("")
    limits.renew()
    assert later.read_text() == "254:0 riops=1500 rbps=40000000 wbps=20000000"
    assert (second_version / "system.slice" / "io.max").read_text().startswith("254:0 rbps=9")


def test_the_fast_disk_is_left_as_it_is(first_version: Path, second_version: Path) -> None:
    for place in (first_version, second_version):
        limits = DiskLimits(PROFILES["fast"], DISK, place)
        limits.renew()
        assert limits.changes() == []
    assert (second_version / "user.slice" / "io.max").read_text() == ""


def test_without_a_controller_or_a_disk_a_limit_is_refused(tmp_path: Path, first_version: Path) -> None:
    with pytest.raises(Refused, match="no block I/O controller"):
        DiskLimits(PROFILES["sd"], DISK, tmp_path / "none").changes()
    with pytest.raises(Refused, match="another --directory"):
        DiskLimits(PROFILES["sd"], "0:45", first_version).changes()


def test_the_limits_are_restored(first_version: Path, tmp_path: Path) -> None:
    file = first_version / "blkio" / "blkio.throttle.write_bps_device"
    with Settings(tmp_path / "record") as settings:
        settings.change(DiskLimits(PROFILES["sd"], DISK, first_version).changes())
        assert file.read_text() == "254:0 20000000"
    assert file.read_text() == "254:0 0"


def test_a_partition_is_limited_as_its_whole_disk(tmp_path: Path) -> None:
    number = f"{(found := tmp_path.stat().st_dev) >> 8 & 0xFFF}:{found & 0xFF}"
    disk, devices = tmp_path / "sda", tmp_path / "dev"
    (disk / "sda1").mkdir(parents=True)
    devices.mkdir()
    (disk / "dev").write_text("8:0\n")
    (disk / "sda1" / "dev").write_text("8:1\n")
    (devices / number).symlink_to(disk / "sda1")
    (disk / "sda1" / "partition").write_text("1\n")
    assert whole_disk(tmp_path, devices) == "8:0"
    (disk / "sda1" / "partition").unlink()
    assert whole_disk(tmp_path, devices) == "8:1"


def test_a_place_on_no_disk_has_the_number_of_its_file_system(tmp_path: Path) -> None:
    assert whole_disk(Path("/proc"), tmp_path).startswith("0:")


def test_the_highest_rates_are_those_of_a_whole_span() -> None:
    busy, idle = DiskCounters(100, 1_000_000, 50, 4_000_000), DiskCounters()
    rates = highest_rates(moments((1, idle), (1, busy), (1, busy), (1, idle)))
    assert rates == {"read_iops": 100, "write_iops": 50, "read_bps": 1e6, "write_bps": 4e6}
    # a burst that is shorter than a span counts as what it is of a span
    assert highest_rates(moments((1, idle), (0.5, busy), (0.5, idle), (1, idle)))["read_iops"] == 100 / SPAN_S


def test_the_rates_of_a_short_part_are_those_of_all_of_it() -> None:
    assert highest_rates(moments((0.5, DiskCounters(reads=10))))["read_iops"] == 20
    assert highest_rates(moments())["read_iops"] == 0


@pytest.mark.parametrize(
    ("written", "said"), [(20_000_000, ""), (25_000_000, "write_bps 25,000,000 where the limit is 20,000,000")]
)
def test_a_limit_that_did_not_hold_is_named(written: int, said: str) -> None:
    samples = moments(*[(1.0, DiskCounters(1, 4096, 2, written))] * 4)
    check = Check.of(0, "plain", "overcommit", samples, PROFILES["sd"].limits)
    assert check.excess == said == excess(highest_rates(samples), PROFILES["sd"].limits)
    assert (check.read_bytes, check.written_bytes) == (4 * 4096, 4 * written)
    assert check.text.endswith(said or "within the limits")


def test_what_has_no_limit_is_never_too_much() -> None:
    samples = moments(*[(1.0, DiskCounters(10**6, 10**12, 10**6, 10**12))] * 3)
    assert Check.of(0, "plain", "fill", samples, PROFILES["fast"].limits).excess == ""


def test_a_watch_has_a_sample_of_the_start_and_one_of_the_end() -> None:
    with DiskWatch(DiskLimits(PROFILES["fast"], DISK)) as watch:
        pass
    assert len(watch.samples) >= 2 and watch.samples == sorted(watch.samples, key=lambda one: one[0])


def test_a_profile_says_its_limits() -> None:
    assert PROFILES["sd"].text == "sd (1,500 reads per s, 40 MB/s read, 20 MB/s written)"
    assert PROFILES["fast"].text == "fast (no limit)"
