"""Density through a real mount: what is left of a workload that ended takes no more than it has to, in RAM and on disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.mounted import mounted
from tests.waiting import wait_until
from tmemfs.cli.real_pages import RealPages
from tmemfs.system.memory import punch
from tmemfs.units import MIB, PAGE_BYTES

pytestmark = pytest.mark.fuse

#: What the kernel discards of a swap device at once.
CLUSTER_BYTES = 2 * MIB
CLUSTER_PAGES = CLUSTER_BYTES // PAGE_BYTES
#: One of so many clusters stays: strays in the kernel's swap cache.
STAYS = 16
CLUSTERS = 192
AT_ONCE = 32


def test_a_few_clusters_that_stay_do_not_keep_the_memory_of_the_others(tmp_path: Path) -> None:
    pages = RealPages(1)
    with mounted(tmp_path, size="1G", pool_max="64M") as place:

        def taken() -> int:
            return place.number("pool_resident") + place.backing.stat().st_blocks * 512

        before = taken()
        image = os.open(place.image, os.O_RDWR)
        try:
            for at in range(0, CLUSTER_PAGES, AT_ONCE):  # a few pages of each cluster in turn, so that no segment dies whole
                for cluster in range(CLUSTERS):
                    first = cluster * CLUSTER_PAGES + at
                    data = b"".join(pages.page(number) for number in range(first, first + AT_ONCE))
                    os.pwrite(image, data, first * PAGE_BYTES)
            assert taken() - before > CLUSTERS * CLUSTER_BYTES // 4 and place.number("pages_on_disk") > 10_000
            for cluster in range(CLUSTERS):
                if cluster % STAYS:
                    punch(image, cluster * CLUSTER_BYTES, CLUSTER_BYTES)
            wait_until(lambda: taken() - before - place.number("compressed_bytes") < 0.02 * 1024 * MIB)
            assert place.number("pages_stored") == CLUSTERS // STAYS * CLUSTER_PAGES
        finally:
            os.close(image)
