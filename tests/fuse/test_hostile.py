"""What unprivileged processes can do by way of the control files."""

from __future__ import annotations

import mmap
import os
import time
from typing import Final

import pytest

from tests.mounted import directory_for_all, mounted, wait_until
from tests.parts import page_of
from tests.waiting import readable
from tmemfs.fuse.forwards import BURST_S, IDLE_GAP_S
from tmemfs.units import MIB, PAGE_BYTES
from tools.hostile import unprivileged, use_many

pytestmark = pytest.mark.fuse

HANDLES: Final = 2000


def test_open_files_of_an_ordinary_user_take_next_to_no_memory() -> None:
    told, tell = os.pipe()
    wait, go = os.pipe()
    with directory_for_all() as directory, mounted(directory) as place:
        names = [str(place.mountpoint / "control" / "metrics")]  # the longest
        for _ in range(5):
            place.read("metrics")
        place.wait_for_spare()
        before = place.number("resident_anon")
        with unprivileged(1, lambda: use_many(names, HANDLES, tell, wait)):
            for _ in range(4):
                assert readable(told)
                os.read(told, 1)
                assert place.number("resident_anon") - before < 2 * MIB
                os.write(go, b".")
    for fd in (told, tell, wait, go):
        os.close(fd)


def test_however_many_ask_they_get_their_share_and_no_more() -> None:
    counts = memoryview(mmap.mmap(-1, PAGE_BYTES)).cast("Q")
    with directory_for_all() as directory, mounted(directory) as place:

        def ask() -> None:
            number = os.getpid() % len(counts)
            while True:
                os.statvfs(place.mountpoint)
                counts[number] += 1

        fd = os.open(place.image, os.O_RDWR)
        try:
            os.pwrite(fd, page_of("half", 1), 0)
            began = time.monotonic()
            with unprivileged(8, ask):
                for _ in range(5000):
                    assert os.pread(fd, PAGE_BYTES, 0) == page_of("half", 1)
                wait_until(lambda: sum(counts) > 0)
                place.read("stat")  # root is not held up
            took = time.monotonic() - began
        finally:
            os.close(fd)
    assert sum(counts) <= (took + BURST_S) / IDLE_GAP_S + 8
