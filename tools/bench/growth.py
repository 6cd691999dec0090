"""`python -m tools.bench.growth [--quick] [--output DIR]`: the costs of a page as swap, pool and processes grow.

    swap        tmemfs mounted with 1 to 64 GiB: memory of the daemon, of tables and of the rest. (For the cost of an operation of
                the store see python -m tools.churn --growth.)
    pool        a growing amount of compressed pages in RAM: swap-in of random pages, and the daemon's CPU of the fill
    processes   a growing number of processes that fault in random pages from RAM, with tmemfs, zram and the null FUSE server

One run each, not interleaved: only the trend counts. Needs what tools.bench.peers needs. Prints Markdown, writes growth.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from tmemfs.errors import TmemfsError
from tmemfs.system.capabilities import require_root
from tmemfs.units import GIB, MIB, PAGE_BYTES, format_size
from tools.bench import workloads
from tools.bench.contenders import Contender, Floor, Limits, Tmemfs, all_contenders, refuse_other_swaps, turned_on
from tools.bench.goals import number
from tools.bench.toucher import herd, write_base
from tools.interrupts import interruptible
from tools.warm import use_memory

SWAPS_GIB: Final = (1, 4, 16, 64)
POOLS_MIB: Final = (64, 256, 1024, 4096)
PROCESSES: Final = (1, 2, 4, 8, 16)
#: Bytes of pages per byte of pool: about the ratio of the pages of tools.bench.
_RATIO: Final = 2.4

Row = dict[str, float | str]


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a pool of 256 MiB at most")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="where backing files go")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="where growth.json goes")
    arguments = parser.parse_args()
    require_root()
    found: dict[str, list[Row]] = {}
    try:
        refuse_other_swaps()
        with interruptible("turning everything off"), tempfile.TemporaryDirectory(dir=arguments.directory) as place:
            base = Path(place) / "base"
            write_base(base)
            use_memory(2 * POOLS_MIB[-1] * MIB)
            found["swap"] = list(swaps(Path(place)))
            found["pool"] = list(pools(Path(place), base, POOLS_MIB[:2] if arguments.quick else POOLS_MIB))
            found["processes"] = list(processes(Path(place), base))
    except TmemfsError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "growth.json").write_text(json.dumps(found, indent=2) + "\n")
    print("\n".join(map(table, found.values())))
    return 0


def swaps(place: Path) -> Iterator[Row]:
    """Memory of a daemon with an empty store."""
    for gib in SWAPS_GIB:
        with turned_on(Tmemfs(), place, Limits(gib * GIB), swap=False) as swap:
            stat = swap.counters()
            resident = sum(stat[f"resident_{kind}"] for kind in ("anon", "file", "shmem"))
            yield {"swap": f"{gib} GiB", "tables, MB": stat["table_bytes"] / 1e6,
                   "beyond pool and tables, MB": (resident - stat["table_bytes"] - stat["pool_resident"]) / 1e6}  # fmt: skip


def pools(place: Path, base: Path, sizes_mib: tuple[int, ...]) -> Iterator[Row]:
    """A process whose pages fill the pool."""
    for mib in sizes_mib:
        sizes = replace(workloads.FULL, set_bytes=int(mib * _RATIO) * MIB + workloads.FULL.limit_bytes)
        with (
            turned_on(Tmemfs(), place, Limits(sizes.swap_bytes)) as swap,
            herd(base, sizes.set_bytes // PAGE_BYTES, sizes.limit_bytes) as one,
        ):
            fill = workloads.fill(swap, one, sizes)
            pool = swap.counters()["pool_current"]
            loads = workloads.faults(swap, one, sizes, 1, 0)
            yield {"pool": format_size(pool), "swap-in p50, us": loads["p50_us"], "p99": loads["p99_us"],
                   "daemon CPU per swap-in, us": loads["daemon_cpu_us"], "per page swapped out": fill["daemon_cpu_us"]}  # fmt: skip


def processes(place: Path, base: Path) -> Iterator[Row]:
    """Processes that fault at the same time: faults per second."""
    zram = [one for one in all_contenders()[0] if one.name == "zram-lz4"]
    contenders: list[Contender] = [Tmemfs(), *zram, Floor()]
    sizes = workloads.FULL
    for count in PROCESSES:
        row: Row = {"processes": str(count)}
        for contender in contenders:
            with (
                turned_on(contender, place, Limits(sizes.swap_bytes)) as swap,
                herd(base, sizes.set_bytes // PAGE_BYTES, sizes.limit_bytes, count) as many,
            ):
                many.fill(0, many.members[0].count)
                row[f"{contender.name}, faults/s"] = workloads.faults(swap, many, sizes, 1, 0)["faults_per_s"]
        yield row


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[value if isinstance(value, str) else number(value) for value in row.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
