"""The conditions that a comparison sets for all contenders alike: the disk, the kernel's read-ahead, and how deeply CPUs sleep.

    --disk PROFILE       the machine's disk, limited (disk.py)
    --page-cluster N     vm.page-cluster, where a workload does not set its own
    --qos                /dev/cpu_dma_latency is held at 0: no idle CPU sleeps deeper than it can be woken from at once

Without them each contender has the machine as it is. Sources: Documentation/admin-guide/sysctl/vm.rst (page-cluster),
Documentation/power/pm_qos_interface.rst.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tmemfs.errors import Refused
from tools.bench.disk import PROFILES, DiskLimits, Profile, whole_disk
from tools.bench.settings import RECORD, Change, Settings
from tools.bench.workloads import PAGE_CLUSTER

_LATENCY: Final = Path("/dev/cpu_dma_latency")
_CLUSTERS: Final = (0, 3)
_NO_LATENCY: Final = bytes(4)


@dataclass(frozen=True, slots=True)
class Conditions:
    """What is set. Without a `page_cluster` it stays as it is."""

    profile: Profile = PROFILES["fast"]
    page_cluster: int | None = None
    qos: bool = False

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Conditions:
        """Those of the command line."""
        return cls(PROFILES[arguments.disk], arguments.page_cluster, arguments.qos)

    @property
    def name(self) -> str:
        """For the names of files."""
        cluster = [] if self.page_cluster is None else [f"cluster{self.page_cluster}"]
        return "-".join([self.profile.name, *cluster, *(["qos"] if self.qos else [])])

    @property
    def record(self) -> dict[str, Any]:
        """For the results, while they are applied: their name, and in words."""
        cluster = PAGE_CLUSTER.read_text().strip()
        sleep = "held at 0 for all" if self.qos else "as each contender has it"
        return {"name": self.name, "disk": self.profile.text, "page_cluster": cluster, "cpu_dma_latency": sleep}

    @contextmanager
    def applied(self, directory: Path, record: Path = RECORD) -> Iterator[DiskLimits]:
        """Set for the block, for the disk that holds `directory`. Raises Refused, Busy."""
        with Settings(record) as settings, _latency_held(self.qos):
            # read after a benchmark that was killed has been cleaned up
            limits = DiskLimits(self.profile, whole_disk(directory))
            settings.change([*limits.changes(), self._cluster()])
            yield limits

    def _cluster(self) -> Change:
        """Recorded in any case: workloads change it."""
        now = PAGE_CLUSTER.read_text().strip()
        return Change(PAGE_CLUSTER, now if self.page_cluster is None else str(self.page_cluster), now)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this module."""
    parser.add_argument("--disk", choices=PROFILES, default="fast", help="limit the machine's disk for all (fast: as it is)")
    parser.add_argument("--page-cluster", type=int, choices=_CLUSTERS, help="vm.page-cluster for all (as it is)")
    parser.add_argument("--qos", action="store_true", help="hold /dev/cpu_dma_latency at 0 for all (as each contender has it)")


@contextmanager
def _latency_held(is_wanted: bool) -> Iterator[None]:
    """The request of no latency while the block runs, if `is_wanted`. The kernel drops it with the descriptor."""
    if not is_wanted:
        yield
        return
    try:
        fd = os.open(_LATENCY, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Refused(f"{_LATENCY}: {error.strerror}: this kernel has no PM QoS, leave out --qos") from error
    try:
        os.write(fd, _NO_LATENCY)
        yield
    finally:
        os.close(fd)
