"""Standard programs as workloads: fio on the block device, stress-ng in a cgroup, and the bare codec as a baseline for a store.

fio writes, reads the same in the same order and verifies it, and then mixes both. Its own figures are used; of the mixed run only
those of the writes, since its reads include the verification. stress-ng runs a single method, so that its operations are alike.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

import lz4.block

from tmemfs.units import MIB, PAGE_BYTES
from tools.bench.accounts import Meter
from tools.bench.contenders import Swap
from tools.bench.limited import limited, oom_kills, output, within
from tools.bench.workloads import Figures

_FIO_S: Final = 60
_PROGRAM_S: Final = 120
_STRESS_SET: Final = 3
_PAGESWAP_LIMIT: Final = 2048 * MIB
_CODEC_PAGES: Final = 4096


@dataclass(frozen=True, slots=True)
class FioPlan:
    """Request sizes, queue depths and compressible shares; every combination is run."""

    file_bytes: int
    blocks: tuple[str, ...] = ("4k", "128k", "1m")
    depths: tuple[int, ...] = (1, 32)
    compressible: tuple[int, ...] = (0, 50, 80)


FULL: Final = FioPlan(64 * MIB)
QUICK: Final = FioPlan(32 * MIB, ("4k",), (32,), (50,))


def fio(swap: Swap, directory: Path, plan: FioPlan) -> Iterator[tuple[str, Figures]]:
    """randwrite, randread and randrw of every combination."""
    for block, depth, percent in product(plan.blocks, plan.depths, plan.compressible):
        for mode in ("randwrite", "randrw"):
            swap.settle()
            meter = Meter(swap.daemons, (), swap.disk, swap.counters)
            before = meter.now()
            job = _fio(swap.device, directory, plan.file_bytes, block, depth, percent, mode)
            used = meter.now().since(before)
            calls = job["write"]["total_ios"] + job["read"]["total_ios"]
            cpu = {"daemon_cpu_us": used.daemon_s / calls * 1e6, "kworkers_cpu_us": used.kworkers_s / calls * 1e6}
            name = f"{block}-{depth}-{percent}%"
            if mode == "randwrite":
                yield f"fio-randread-{name}", direction_figures(job["read"])
            yield f"fio-{mode}-{name}", {**direction_figures(job["write"]), **cpu}


def direction_figures(direction: dict[str, Any]) -> Figures:
    """One direction of a job in fio's JSON."""
    percentiles = direction["clat_ns"].get("percentile", {})
    return {
        "mb_per_s": direction["bw_bytes"] / 1e6,
        "iops": direction["iops"],
        **{f"p{name}_us": percentiles[key] / 1e3 for name, key in (("50", "50.000000"), ("99", "99.000000")) if key in percentiles},
    }


def stress(swap: Swap, limit_bytes: int, seconds: int) -> Iterator[tuple[str, Figures]]:
    """stress-ng: vm, which verifies three times the limit, and pageswap, which pages out memory that would fit.

    The kernel's OOM killer kills processes of vm with every swap, because reclaim in a cgroup gives up early. stress-ng starts them
    again; `oom_kills` says how often. (Its stressor swap uses swap files of its own.)
    """
    vm = f"--vm 2 --vm-bytes {limit_bytes * _STRESS_SET} --vm-keep --vm-method rand-set --verify"
    for stressor, options, most_bytes in (("vm", vm, limit_bytes), ("pageswap", "--pageswap 1", _PAGESWAP_LIMIT)):
        with limited(most_bytes, may_kill=True) as cgroup:
            command = ["stress-ng", *options.split(), "--timeout", f"{seconds}s", "--metrics-brief", "--temp-path", "/tmp"]
            meter = Meter(swap.daemons, (), swap.disk, swap.counters)
            before = meter.now()
            said = output(within(cgroup, *command), with_errors=True).decode(errors="replace")
            used = meter.now().since(before)
            pages = max(used.pages_in + used.pages_out, 1)
            figures = {"ops_per_s": parse_stress(said, stressor), "oom_kills": oom_kills(cgroup), "pages_swapped": pages}
            yield f"stress-{stressor}", {**figures, **used.wear, "daemon_cpu_us": used.daemon_s / pages * 1e6}


def parse_stress(text: str, stressor: str) -> float:
    """Operations per second of real time, of one stressor in --metrics-brief."""
    for line in text.splitlines():
        words = line.partition("]")[2].split()
        if len(words) > 5 and words[0] == stressor:
            return float(words[5])
    raise ValueError(f"no figure of {stressor} in what stress-ng said: {text}")


def codec(base: Path) -> Figures:
    """CPU of lz4 alone on the pages that are swapped."""
    data = base.read_bytes()
    pages = [data[at : at + PAGE_BYTES] for at in range(0, len(data), PAGE_BYTES)][:_CODEC_PAGES]
    began = time.thread_time()
    sizes = [len(lz4.block.compress(page, "default", False)) for page in pages]
    return {"cpu_us": (time.thread_time() - began) / len(pages) * 1e6, "ratio": len(pages) * PAGE_BYTES / sum(sizes)}


def _fio(device: str, directory: Path, size: int, block: str, depth: int, percent: int, mode: str) -> dict[str, Any]:
    command = ["fio", "--name=one", f"--filename={device}", f"--size={size}", f"--rw={mode}", f"--bs={block}", f"--iodepth={depth}",
               "--direct=1", "--ioengine=libaio", f"--buffer_compress_percentage={percent}", "--refill_buffers",
               "--buffer_compress_chunk=4096", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", f"--runtime={_FIO_S}",
               "--output-format=json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PROGRAM_S, cwd=directory, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr}")
    job: dict[str, Any] = json.loads(done.stdout)["jobs"][0]
    if job["error"]:
        raise RuntimeError(f"{' '.join(command)}: error {job['error']}, a block did not come back as it was written?")
    return job
