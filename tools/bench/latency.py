"""`python -m tools.bench.latency [--rounds N] [--output DIR]`: what it gives and costs to keep idle CPUs awake (control/latency).

One swap is on. Its setting changes from one variant to the next, in rounds: off, auto, always, off with halt polling, off, ...

    fill, sequential    as in tools.bench.workloads
    ram, disk           random touches, page-cluster 0
    paced-N             random touches from RAM with pauses, N per second at most, page-cluster 0
    idle                nothing is touched

`polled` is the share of the time of all CPUs for which they polled instead of halting, `daemon` the CPU of all processes of the
daemon, `held` the share of time for which CPUs were kept awake, all in percent. Figures are medians over the rounds. Needs what
tools.bench.peers needs, and /dev/cpu_dma_latency. Halt polling is left out where the governor is not haltpoll. Prints Markdown,
writes latency.json. Leaves nothing behind.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Final

from tmemfs.errors import TmemfsError
from tmemfs.system import cpu_latency
from tmemfs.system.capabilities import require_root
from tmemfs.units import MIB, PAGE_BYTES
from tools.bench.contenders import Limits, Swap, Tmemfs, refuse_other_swaps, turned_on
from tools.bench.goals import number
from tools.bench.statistics import Sample, by_round, spread
from tools.bench.toucher import herd, write_base
from tools.bench.workloads import Figures, Sizes, faults, fill, idle
from tools.interrupts import interruptible
from tools.warm import use_memory

SIZES: Final = Sizes(256 * MIB, 700 * MIB, 20_000, (), 0)
PACED_PER_S: Final = (100, 1000, 2500)
PACED_S: Final = 2
IDLE_S: Final = 3.0
#: The setting, and the nanoseconds for which the governor polls; 200000 is the kernel's own default.
VARIANTS: Final = {"off": ("off", 0), "auto": ("auto", 0), "always": ("always", 0), "halt polling": ("off", 200_000)}
_SHOWN: Final = {
    "mb_per_s": "MB/s",
    "p50_us": "p50 us",
    "p99_us": "p99 us",
    "polled": "polled %",
    "daemon": "daemon %",
    "held": "held %",
}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="where the backing file goes")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="where latency.json goes")
    arguments = parser.parse_args()
    require_root()
    try:
        cpu_latency.check_device()
        refuse_other_swaps()
        with interruptible("turning everything off"), tempfile.TemporaryDirectory(dir=arguments.directory) as place:
            write_base(Path(place) / "base")
            use_memory(4 * SIZES.set_bytes)
            samples = list(measure(Path(place), arguments.rounds))
    except TmemfsError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "latency.json").write_text(json.dumps([asdict(sample) for sample in samples], indent=1) + "\n")
    print(table(samples))
    return 0


def measure(place: Path, rounds: int) -> Iterator[Sample]:
    """Everything, with one swap."""
    polls = cpu_latency.idle().poll_ns is not None
    with turned_on(Tmemfs(), place, Limits(SIZES.swap_bytes)) as swap:
        setting = place / Tmemfs().name / "mnt/control/latency"
        for round_number in range(rounds):
            for variant, (mode, poll_ns) in VARIANTS.items():
                if polls or not poll_ns:
                    setting.write_text(mode)
                    with halt_polling(poll_ns if polls else None):
                        for name, figures in workloads(swap, place / "base", round_number + 1):
                            yield Sample(round_number, variant, name, figures | _percents(figures))
                    print(f"round {round_number} {variant}", file=sys.stderr, flush=True)


def workloads(swap: Swap, base: Path, seed: int) -> Iterator[tuple[str, Figures]]:
    """Each workload with its figures."""
    with herd(base, SIZES.set_bytes // PAGE_BYTES, SIZES.limit_bytes) as one:
        yield "fill", fill(swap, one, SIZES)
        yield "sequential", faults(swap, one, SIZES, seed, 3, "sequential")
        yield "ram", faults(swap, one, SIZES, seed, 0)
        for per_s in PACED_PER_S:
            few = Sizes(SIZES.limit_bytes, SIZES.set_bytes, per_s * PACED_S, (), 0)
            yield f"paced-{per_s}", faults(swap, one, few, seed, 0, pause_us=1_000_000 // per_s)
        yield "idle", idle(swap, one, IDLE_S)
        yield "disk", faults(swap, one, SIZES, seed, 0, from_disk=True)


@contextmanager
def halt_polling(poll_ns: int | None) -> Iterator[None]:
    """The governor polls for `poll_ns`; None: it is left as it is."""
    if poll_ns is None:
        yield
        return
    before = cpu_latency.POLL_NS.read_text()
    try:
        cpu_latency.POLL_NS.write_text(str(poll_ns))
        yield
    finally:
        cpu_latency.POLL_NS.write_text(before)


def table(samples: list[Sample]) -> str:
    """Medians, one line per workload and variant."""
    lines = [["workload", "latency", *_SHOWN.values()], ["---"] * (2 + len(_SHOWN))]
    for workload in dict.fromkeys(sample.workload for sample in samples):
        for variant in dict.fromkeys(sample.contender for sample in samples):
            found = [spread(by_round(samples, (variant, workload, figure)).values()) for figure in _SHOWN]
            lines.append([workload, variant, *(number(one.median) if one else "-" for one in found)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _percents(figures: Figures) -> Figures:
    held_s = figures.get("latency_held_ms", 0.0) / 1000
    shares = {"polled": figures["polled_share"], "daemon": figures["daemon_share"], "held": held_s / figures["wall_s"]}
    return {name: share * 100 for name, share in shares.items()}


if __name__ == "__main__":
    sys.exit(main())
