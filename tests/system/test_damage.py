"""Damage under a real swap: it costs the damaged pages, and of the first request that meets one the pages behind it for a while."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import pytest

from tests.mounted import Place, swap_up, tmemfs
from tests.waiting import wait_until
from tmemfs.system import swapdev
from tmemfs.tiers.file import BACKING_HEADER_BYTES
from tmemfs.units import MIB, PAGE_BYTES, SEGMENT_BYTES
from tools.cgroup import MemoryCgroup

pytestmark = pytest.mark.system

PAGES = 64 * MIB // PAGE_BYTES
DAMAGED = 6
#: What swap reads ahead: 1 << vm.page-cluster.
CLUSTER_PAGES = 8
#: Fills its memory, prints where that is, and waits. Its own pages are locked, so that damage meets none of them.
OWNER = """
import ctypes, mmap, random, sys
memory = mmap.mmap(-1, {pages} * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
with open(sys.argv[1], "w") as tasks:
    tasks.write("0")
for number in range({pages}):
    memory[number * 4096 : (number + 1) * 4096] = random.Random(number).randbytes(4096)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""


class Owner:
    """A process that owns PAGES pages of noise. They are read from outside, where a page that cannot be had kills nobody."""

    def __init__(self, cgroup: MemoryCgroup) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", OWNER.format(pages=PAGES), str(cgroup.tasks)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self._at = int(self._process.stdout.readline())
        self._memory = os.open(f"/proc/{self._process.pid}/mem", os.O_RDONLY)

    def has(self, number: int) -> bool:
        """Whether page `number` can be had. It is verified."""
        try:
            page = os.pread(self._memory, PAGE_BYTES, self._at + number * PAGE_BYTES)
        except OSError:
            return False
        assert page == Random(number).randbytes(PAGE_BYTES), number
        return True

    def lost(self, numbers: Iterable[int]) -> list[int]:
        """Those of `numbers` that cannot be had."""
        return [number for number in numbers if not self.has(number)]

    def end(self) -> None:
        """Kill the process."""
        os.close(self._memory)
        self._process.kill()
        self._process.communicate()


@contextmanager
def owner_in(cgroup: MemoryCgroup) -> Iterator[Owner]:
    owner = Owner(cgroup)
    try:
        yield owner
    finally:
        owner.end()


def no_merges(place: Place) -> str:
    [device] = swapdev.loop_devices_of(place.image)
    return (swapdev.SYS_BLOCK / Path(device).name / "queue" / "nomerges").read_text().strip()


def damage(place: Place, records: int) -> None:
    """Damage a record in each of `records` segments, far from its ends."""
    with open(place.backing, "r+b") as backing:
        for number in range(records):
            backing.seek(BACKING_HEADER_BYTES + 2 * number * SEGMENT_BYTES + 300_000)
            backing.write(b"damage")


def _swapped_out(place: Place, cgroup: MemoryCgroup) -> bool:
    cgroup.reclaim()
    return place.number("pages_stored") > PAGES * 9 // 10


def test_damage_costs_its_pages_and_for_a_while_those_behind_the_first_one(tmp_path: Path) -> None:
    with (
        swap_up(tmp_path, size="512M", pool_max="256M") as place,
        # a limit that is not reached: at one that is, the kernel was seen to run out of memory after failed swap reads
        MemoryCgroup("damage", 4 * PAGES * PAGE_BYTES) as cgroup,
        owner_in(cgroup) as owner,
    ):
        wait_until(lambda: _swapped_out(place, cgroup))
        with suppress(BlockingIOError):
            place.write("shrink", "all")
        assert place.number("pages_on_disk") > PAGES // 2
        damage(place, DAMAGED)
        assert no_merges(place) == "0"
        first = next(number for number in range(PAGES) if not owner.has(number))
        wait_until(lambda: no_merges(place) == "2")
        lost = owner.lost(range(first, PAGES))
        # each page of swap is in one request at a time: what was merged with the first damaged page, and no other good page
        assert all(number < first + 2 * CLUSTER_PAGES for number in lost[: len(lost) - DAMAGED + 1])
        assert DAMAGED <= len(lost) < DAMAGED + CLUSTER_PAGES
        assert place.state == f"degraded: loads found {DAMAGED} damaged records: check the backing device"
        cgroup.reclaim()  # the kernel keeps what it could not read, until it needs the memory
        wait_until(lambda: len(owner.lost(lost)) == DAMAGED)
        tmemfs("doctor", "--acknowledge", place.mountpoint)
        wait_until(lambda: no_merges(place) == "0")
        assert place.state == "running"
