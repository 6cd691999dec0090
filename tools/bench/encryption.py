"""`python -m tools.bench.encryption [--rounds N] [--directory DIR]`: what encryption at rest costs.

Two mounts, one that encrypts and one that does not, take turns in each round: the pool is filled with heap pages, `shrink all`
writes it out, and single pages are loaded from disk, each verified. Prints medians and ranges over the rounds as a table, and
those of the ratios within each round. Needs root and FUSE. Leaves nothing behind.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Final

from tmemfs.cli.real_pages import RealPages
from tmemfs.errors import TmemfsError
from tmemfs.system.capabilities import require_root
from tmemfs.units import MIB, PAGE_BYTES
from tools.bench import core
from tools.bench.mounts import Mount, mounted
from tools.interrupts import interruptible
from tools.warm import use_memory

POOL_BYTES: Final = 256 * MIB
READS: Final = 2000


@dataclass(frozen=True, slots=True)
class Costs:
    """One round of one mount: megabytes per second, CPU of the daemon per MiB written, latency and CPU of a load."""

    shrink_rate: float
    shrink_cpu_us: float
    load_p50_us: float
    load_p99_us: float
    load_cpu_us: float


_HEADINGS: Final = ("shrink, MB/s", "shrink, CPU us per MiB", "load, p50 us", "load, p99 us", "load, CPU us")


def measure(directory: Path, rounds: int) -> dict[str, list[Costs]]:
    """The costs of each round, with encryption `on` and `off`."""
    pages, most = RealPages(), POOL_BYTES * 3 // PAGE_BYTES
    pool = str(POOL_BYTES * 9 // 8)
    options = ("--size", str(most * PAGE_BYTES), "--pool-max", pool, "--encrypt")
    with mounted(directory, "on", *options, "on") as on, mounted(directory, "off", *options, "off") as off:
        mounts = {"on": on, "off": off}
        done: dict[str, list[Costs]] = {name: [] for name in mounts}
        for mount in mounts.values():
            mount.write("pool.high", pool)  # no background write-back: the shrink has to find everything in RAM
        for number in range(rounds):
            # the first of a round finds the disk in another state than the second does
            for name in sorted(mounts, reverse=bool(number % 2)):
                done[name].append(_round(mounts[name], pages, most, number))
    return done


def _round(mount: Mount, pages: RealPages, most: int, number: int) -> Costs:
    count = core.fill(mount, pages, most, POOL_BYTES)
    before = mount.cpu_s()
    mount.write("shrink", "all")
    shrink_s = mount.cpu_s() - before
    answer = mount.flat("shrink")
    written = int(answer["written"])
    before = mount.cpu_s()
    times = sorted(core.read(mount, pages, Random(number).sample(range(count), READS)))
    load_s = mount.cpu_s() - before
    return Costs(
        written / float(answer["seconds"]) / 1e6,
        shrink_s / (written / MIB) * 1e6,
        times[READS // 2] * 1e6,
        times[READS * 99 // 100] * 1e6,
        load_s / READS * 1e6,
    )


def table(done: dict[str, list[Costs]]) -> str:
    """Medians and ranges, and the median of the ratios within each round."""
    lines = ["| figure | encrypted | not encrypted | ratio |", "|---|---|---|---|"]
    for at, heading in enumerate(_HEADINGS):
        on, off = ([astuple(costs)[at] for costs in done[name]] for name in ("on", "off"))
        ratios = [a / b for a, b in zip(on, off, strict=True)]
        lines.append(f"| {heading} | {_range(on)} | {_range(off)} | {_range(ratios, 2)} |")
    return "\n".join(lines)


def _range(values: Sequence[float], digits: int = 0) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="where the backing files go")
    arguments = parser.parse_args()
    try:
        require_root()
        with interruptible("taking everything down"), tempfile.TemporaryDirectory(dir=arguments.directory) as place:
            use_memory(4 * POOL_BYTES)
            print(table(measure(Path(place), arguments.rounds)))
    except TmemfsError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
