"""Which swap lies on our image: by the kernel's tables, without asking the image, and told when it changes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tmemfs.system.swap_watch import SwapWatch

HEAD = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"


@dataclass
class Tables:
    """The kernel's tables as files."""

    root: Path
    mountpoint: Path = Path("/run/tm emfs")

    def __post_init__(self) -> None:
        (self.root / "block").mkdir()
        self.swaps()
        self.mount(self.mountpoint)

    def swaps(self, *paths: str) -> None:
        text = HEAD + "".join(f"{path + ' ' * 30}partition\t1024\t\t0\t\t100\n" for path in paths)
        (self.root / "swaps").write_text(text)

    def loop(self, name: str, backing: bytes) -> None:
        (self.root / "block" / name / "loop").mkdir(parents=True, exist_ok=True)
        (self.root / "block" / name / "loop/backing_file").write_bytes(backing + b"\n")

    def mount(self, *places: Path) -> None:
        escaped = [str(place).replace(" ", "\\040") for place in places]
        lines = [f"36 35 0:50 / {place} rw,nosuid - fuse.tmemfs tmemfs rw\n" for place in escaped]
        (self.root / "mounts").write_text("".join(lines))

    def watch(self) -> SwapWatch:
        return SwapWatch(self.mountpoint, self.root / "swaps", self.root / "block", self.root / "mounts")


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    return Tables(tmp_path)


def test_a_swap_over_our_image_is_found_and_no_other(tables: Tables) -> None:
    watch = tables.watch()
    tables.loop("loop0", b"/run/other/swap")
    tables.loop("loop1", b"/run/tm emfs/swap")
    for paths, found in (
        ((), None),
        (("/dev/loop0", "/dev/vda2", "/swapfile"), None),
        (("/dev/loop0", "/dev/loop1"), "loop1"),
        ((), None),
    ):
        tables.swaps(*paths)
        assert watch.look() == found
    watch.close()


def test_a_loop_device_that_is_no_swap_is_none(tables: Tables) -> None:
    tables.loop("loop1", b"/run/tm emfs/swap")
    watch = tables.watch()
    assert watch.look() is None
    watch.close()


@pytest.mark.parametrize(
    "backing", [b"/run/tm emfs/swap (deleted)", b"/run/tm emfs/swap2", b"x/run/tm emfs/swap", b"\xff\xe2\x80\xa8", b""]
)
def test_another_file_is_not_ours_whatever_its_name(tables: Tables, backing: bytes) -> None:
    tables.loop("loop1", backing)
    tables.swaps("/dev/loop1")
    watch = tables.watch()
    assert watch.look() is None
    watch.close()


def test_one_that_was_ours_stays_ours_after_its_mount_was_detached(tables: Tables) -> None:
    tables.loop("loop1", b"/run/tm emfs/swap")
    tables.swaps("/dev/loop1")
    watch = tables.watch()
    assert watch.look() == "loop1"
    tables.loop("loop1", b"/swap")
    tables.mount(Path("/elsewhere"))
    assert watch.look() == "loop1"
    tables.swaps()
    assert watch.look() is None
    watch.close()


@pytest.mark.parametrize("is_mounted", [True, False])
def test_an_image_without_a_path_is_ours_only_if_our_mount_is_detached(tables: Tables, is_mounted: bool) -> None:
    tables.loop("loop1", b"/swap")
    tables.swaps("/dev/loop1")
    tables.mount(*([tables.mountpoint] if is_mounted else []))
    watch = tables.watch()
    assert watch.look() == (None if is_mounted else "loop1")
    watch.close()


def test_a_long_table_is_read_to_its_end(tables: Tables) -> None:
    tables.loop("loop1", b"/run/tm emfs/swap")
    tables.swaps(*(f"/dev/vd{number}" for number in range(500)), "/dev/loop1")
    watch = tables.watch()
    assert watch.look() == "loop1"
    watch.close()


@pytest.mark.parametrize(
    ("text", "has_requests"), [("       0        0\n", False), ("       0       10\n", True), ("       1        0\n", True)]
)
def test_requests_of_the_kernel_are_seen(tables: Tables, text: str, has_requests: bool) -> None:
    tables.loop("loop1", b"/run/tm emfs/swap")
    (tables.root / "block/loop1/inflight").write_text(text)
    watch = tables.watch()
    swap = watch.open("loop1")
    assert swap.has_requests() == has_requests
    swap.close()
    watch.close()


def test_where_requests_are_not_told_there_may_be_some(tables: Tables) -> None:
    watch = tables.watch()
    swap = watch.open("loop1")
    assert swap.has_requests()
    swap.close()
    watch.close()


def test_no_descriptor_is_left(tables: Tables) -> None:
    before = len(os.listdir("/proc/self/fd"))
    watch = tables.watch()
    watch.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_kernels_table_can_be_waited_for() -> None:
    watch = SwapWatch(Path("/nowhere"))
    assert watch.fileno() > 0 and watch.look() is None
    watch.clear()
    watch.close()
