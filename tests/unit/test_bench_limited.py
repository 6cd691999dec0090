"""Programs in a cgroup: its statistics, what the OOM killer ended, and the wear of the disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.waiting import wait_until
from tmemfs.units import PAGE_BYTES
from tools.bench import contenders, limited
from tools.bench.accounts import OWN_WEAR, OWN_WRITTEN, WEAR, DiskCounters, Meter, Usage
from tools.bench.fresh_statistics import fresh_statistics
from tools.bench.limited import ProgramFailed, costs, each_limited
from tools.bench.workloads import Figures
from tools.cgroup import MemoryCgroup


def test_the_statistics_of_a_cgroup_are_read_until_the_end_although_it_vanishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []

    def read(file: Path) -> bytes:
        reads.append(file)
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_bytes", read)
    with fresh_statistics(tmp_path, 0.001):
        wait_until(lambda: len(reads) >= 3)
    assert set(reads) == {tmp_path / "memory.stat"}
    assert "fresh-statistics" not in [thread.name for thread in threading.enumerate()]


@pytest.fixture
def no_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    """`limited` without a cgroup, whose OOM killer ends what is called `killed`."""
    monkeypatch.setattr(limited, "limited", lambda limit_bytes: nullcontext())


@pytest.mark.usefixtures("no_cgroup")
def test_a_program_that_fails_does_not_end_the_others_and_kills_are_reported() -> None:
    def run(name: str, cgroup: MemoryCgroup) -> Figures:
        runs: dict[str, Callable[[], float]] = {"good": lambda: 1.0, "late": lambda: 2.0}
        if name == "killed":
            raise ProgramFailed("the OOM killer ended 2", kills=2)
        return {"seconds": runs[name]()}

    found = []
    with pytest.raises(ProgramFailed, match="killed: ProgramFailed"):
        for one in each_limited("real", {"good": 1, "killed": 1, "late": 1}, run):
            found.append(one)
    assert found == [
        ("real-good", {"seconds": 1.0}), ("kills-real-good", {"oom_kills": 0}), ("kills-real-killed", {"oom_kills": 2}),
        ("real-late", {"seconds": 2.0}), ("kills-real-late", {"oom_kills": 0}),
    ]  # fmt: skip


def used_of(own_written_bytes: int, written_bytes: int, **swapped: int) -> Usage:
    return Usage(1.0, 0.0, 0.0, 0.0, 0.0, DiskCounters(0, 0, 4, written_bytes), swapped, own_written_bytes=own_written_bytes)


def test_wear_is_what_was_written_per_page_out_by_both_counts() -> None:
    used = used_of(5000, 9192, pswpout=14, zswpout=2, zswpwb=2).since(used_of(1000, 1000, pswpout=10))
    assert used.wear == {WEAR: 2048, OWN_WEAR: 1000}
    assert costs(used, 100)[WEAR] == 2048
    assert used_of(0, 0).wear == {}


def test_a_meter_reads_what_the_swap_itself_wrote() -> None:
    assert Meter((), (), "0:0", lambda: {OWN_WRITTEN: 77}).now().own_written_bytes == 77
    assert Meter((), (), "0:0").now().own_written_bytes == 0


def test_what_is_in_zram_is_not_on_disk(tmp_path: Path) -> None:
    (tmp_path / "mm_stat").write_text("  4096 1000 8192 0 9000 1 0\n")
    assert contenders._zram_counters(tmp_path)[OWN_WRITTEN] == 0


def test_the_kernel_counts_for_a_swap_file() -> None:
    assert contenders._kernel_counters()[OWN_WRITTEN] % PAGE_BYTES == 0
