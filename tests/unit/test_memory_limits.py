"""Which cgroups a swapoff would overfill, on trees made here as both versions of the kernel's interface have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tmemfs.errors import Refused
from tmemfs.system.memory_limits import Overfull, memory_roots, overfull, refuse_if_overfull
from tmemfs.system.proctext import Mount
from tmemfs.units import GIB, MIB

UNLIMITED_V1 = 9223372036854771712


def v1(directory: Path, limit: int, usage: int, swap: int, cache: int = 0, swapcached: int = 0) -> Path:
    """A cgroup; sizes in MiB. What is below it is in the figures that begin with total_."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.limit_in_bytes").write_text(f"{limit * MIB if limit else UNLIMITED_V1}\n")
    (directory / "memory.usage_in_bytes").write_text(f"{usage * MIB}\n")
    figures = {"cache": 0, "swap": 0, "inactive_file": 0, "total_swap": swap, "total_swapcached": swapcached}
    figures |= {"total_inactive_file": cache // 2, "total_active_file": cache - cache // 2}
    (directory / "memory.stat").write_text("".join(f"{key} {value * MIB}\n" for key, value in figures.items()))
    return directory


def v2(directory: Path, limit: int | None, usage: int, swap: int, cache: int = 0, swapcached: int = 0) -> Path:
    """A cgroup; sizes in MiB, None: max."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.max").write_text("max\n" if limit is None else f"{limit * MIB}\n")
    (directory / "memory.high").write_text(f"{MIB}\n")
    (directory / "memory.current").write_text(f"{usage * MIB}\n")
    (directory / "memory.swap.current").write_text(f"{swap * MIB}\n")
    figures = {"inactive_file": cache // 2, "active_file": cache - cache // 2, "swapcached": swapcached}
    (directory / "memory.stat").write_text("".join(f"{key} {value * MIB}\n" for key, value in figures.items()))
    return directory


def mount_of(root: Path, is_v1: bool) -> Mount:
    return Mount(31, "/", str(root), "cgroup" if is_v1 else "cgroup2", ("rw", "memory") if is_v1 else ("rw",))


@pytest.mark.parametrize("is_v1", [True, False])
@pytest.mark.parametrize(
    ("limit", "usage", "swap", "cache", "coming", "short"),
    [
        (128, 120, 384, 0, 1000, 376),
        (128, 120, 8, 0, 1000, 0),
        (128, 120, 100, 100, 1000, 0),  # the page cache can be dropped
        (128, 120, 384, 0, 20, 12),  # most of it lies in another swap
        (128, 120, 384, 0, 0, 0),
        (128, 0, 0, 0, 1000, 0),
    ],
)
def test_a_cgroup_is_overfull_by_what_does_not_fit_below_its_limit(
    tmp_path: Path, is_v1: bool, limit: int, usage: int, swap: int, cache: int, coming: int, short: int
) -> None:
    group = (v1 if is_v1 else v2)(tmp_path / "a" / "b", limit, usage, swap, cache)
    found = overfull(tmp_path, is_v1, coming * MIB)
    assert [(one.directory, one.short_bytes // MIB) for one in found] == ([(group, short)] if short else [])


def test_the_swap_cache_counts_once(tmp_path: Path) -> None:
    v1(tmp_path / "one", 128, 120, 100, swapcached=92)  # of these figures only that of memory has it
    v2(tmp_path / "two", 128, 120, 100, swapcached=92)
    v2(tmp_path / "three", 128, 120, 100, swapcached=91)
    found = [
        *overfull(tmp_path / "one", True, GIB),
        *overfull(tmp_path / "two", False, GIB),
        *overfull(tmp_path / "three", False, GIB),
    ]
    assert [(one.directory.name, one.short_bytes // MIB) for one in found] == [("one", 92), ("three", 1)]


def test_a_cgroup_without_a_limit_or_without_figures_is_passed_over(tmp_path: Path) -> None:
    v1(tmp_path / "one", 0, 5000, 5000)
    (tmp_path / "one" / "bare").mkdir()
    v2(tmp_path / "two", None, 5000, 5000)
    (tmp_path / "two" / "no-swap").mkdir()
    v2(tmp_path / "two" / "no-swap", 1, 5000, 5000)
    (tmp_path / "two" / "no-swap" / "memory.swap.current").unlink()
    assert overfull(tmp_path / "one", True, GIB) == [] == overfull(tmp_path / "two", False, GIB)


def test_the_limit_of_a_cgroup_above_counts_too(tmp_path: Path) -> None:
    v2(tmp_path / "slice", 200, 150, 300)
    v2(tmp_path / "slice" / "service", None, 150, 300)
    assert [(one.directory.name, one.short_bytes) for one in overfull(tmp_path, False, GIB)] == [("slice", 250 * MIB)]


def test_the_worst_is_named_with_what_to_do(tmp_path: Path) -> None:
    v1(tmp_path / "hog", 128, 120, 384)
    for number in range(4):
        v1(tmp_path / f"little{number}", 100, 100, 1 + number)
    with pytest.raises(Refused) as caught:
        refuse_if_overfull([mount_of(tmp_path, True)], GIB, 0)
    said = str(caught.value)
    assert f"below their limit: {tmp_path}/hog (384 MiB swapped out, 120 MiB in use, limit 128 MiB); {tmp_path}/little3" in said
    assert "; and 2 more. Raise the limit (echo " in said and f" > {tmp_path}/hog/memory.limit_in_bytes)" in said
    assert int(said.partition("(echo ")[2].split(" ")[0]) >= 504 * MIB
    assert said.endswith("or use --force")


def test_what_another_swap_can_take_is_no_reason_to_refuse(tmp_path: Path) -> None:
    v2(tmp_path / "a", 100, 100, 50)
    v2(tmp_path / "a" / "below", 100, 100, 40)
    v2(tmp_path / "a" / "beside", 100, 100, 30)
    mounts = [mount_of(tmp_path, False)]
    refuse_if_overfull(mounts, GIB, 70 * MIB)  # the two below together
    with pytest.raises(Refused, match="below their limit"):
        refuse_if_overfull(mounts, GIB, 70 * MIB - 1)


def test_every_memory_hierarchy_is_looked_at_once(tmp_path: Path) -> None:
    mounts = [
        Mount(30, "/", "/sys/fs/cgroup/cpu", "cgroup", ("rw", "cpu")),
        Mount(31, "/", "/sys/fs/cgroup/memory", "cgroup", ("rw", "memory")),
        Mount(31, "/", "/other", "cgroup", ("rw", "memory")),
        Mount(32, "/", "/sys/fs/cgroup/unified", "cgroup2", ("rw",)),
        Mount(33, "/", "/run", "tmpfs", ("rw", "memory")),
    ]
    assert memory_roots(mounts) == [(Path("/sys/fs/cgroup/memory"), True), (Path("/sys/fs/cgroup/unified"), False)]


def test_nothing_is_short_that_fits() -> None:
    assert Overfull(Path("/x"), "memory.max", 100, 40, 60).short_bytes == 0
