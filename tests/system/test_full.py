"""A process that wants more than fits: how often the kernel tries again before its OOM killer ends it, and what is left after it.

Nothing here depends on seconds. The kernel tries each page that it could reclaim 50 to 90 times (docs/benchmarks.md); what tmemfs
adds to that is a waiting store, so those are counted.
"""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.mounted import swap_up, wait_until
from tmemfs.units import MIB, PAGE_BYTES
from tools.bench.accounts import parse_flat
from tools.bench.full import OVERFILL
from tools.bench.limited import limited, oom_kills
from tools.bench.native import compiled

pytestmark = pytest.mark.system

LIMIT_BYTES = 32 * MIB
PAGES = LIMIT_BYTES // PAGE_BYTES
#: Times that each page of the cgroup is written, at most: twice the worst that was measured.
MOST_PASSES = 180


def swapped_out() -> int:
    return parse_flat(Path("/proc/vmstat").read_text())["pswpout"]


@pytest.mark.timeout(300)
def test_a_process_that_wants_more_than_fits_is_killed_and_its_refused_stores_waited_for_nothing(tmp_path: Path) -> None:
    options = ("--backing-max", "16M")
    with swap_up(tmp_path, *options, pool_max="16M") as place, limited(LIMIT_BYTES, may_kill=True) as cgroup:
        before = swapped_out()
        command = [str(compiled(OVERFILL)), str(8 * PAGES), str(cgroup.tasks), "in-order"]
        done = subprocess.run(command, timeout=250, check=False)
        assert done.returncode == -signal.SIGKILL and oom_kills(cgroup) == 1
        refused = int(place.flat("events")["stores_refused"])
        assert refused > 1000
        assert place.number("deferred") < refused // 4
        assert swapped_out() - before < MOST_PASSES * PAGES
        place.write("backing.max", "max")
        wait_until(lambda: place.state == "running")
