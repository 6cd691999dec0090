"""`python -m tools.churn`: write and space amplification of the store under workloads that overwrite and discard.

    --workload uniform|zipf|processes   --utilisation 0.8   --operations 20000000   --slots 131072   --score cost|greedy
    --sweep     all workloads at utilisations of 0.5, 0.7, 0.8 and 0.9, and a picture
    --growth    CPU time per operation from 1 GiB to 64 GiB of slots, on the file --backing, which grows to 31 GiB

Writes OUTPUT/churn.json (and churn.png). Steady figures are those of the second half of a run. Needs neither root nor disk.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random

from tmemfs.policy.cleaning import benefit_per_cost, greedy
from tmemfs.tiers.file import FileTier
from tools.churn.drive import Drive, Point
from tools.churn.greedy import Greedy, bound
from tools.churn.workloads import WORKLOADS

SCORES: dict[str, Callable[[float, float], float]] = {"cost": benefit_per_cost, "greedy": greedy}
UTILISATIONS = (0.5, 0.7, 0.8, 0.9)
GIB_OF_SLOTS = (1, 4, 16, 64)
#: Pages verified after a run of millions of pages on a disk.
VERIFIED = 100_000


@dataclass(frozen=True, slots=True)
class Run:
    """One run: amplifications in its second half, relative to bytes first stored and to bytes written back."""

    workload: str
    score: str
    utilisation: float
    slots: int
    operations: int
    write_amplification: float
    tier_amplification: float
    space_amplification: float
    compacted: float
    cpu_us: float
    greedy_simulation: float
    points: list[Point]


def run(workload: str, score: str, utilisation: float, slots: int, operations: int) -> Run:
    """Fill, churn, verify every page, compact."""
    drive = Drive(slots, utilisation, SCORES[score])
    drive.fill()
    points = drive.run(WORKLOADS[workload](slots, Random(1)), operations)
    drive.verify()
    steady = points[len(points) // 2 :]
    stored, written, cleaned = (sum(getattr(point, key) for point in steady) for key in ("stored", "written", "cleaned"))
    space = sum(point.space_amplification for point in steady) / len(steady)
    cpu_us = sum(point.cpu_s for point in points) / operations * 1e6
    simulated = simulate(workload, utilisation, slots, min(operations, 4 * slots))
    compacted = drive.compact()
    drive.verify()
    return Run(workload, score, utilisation, slots, operations, (written + cleaned) / stored,
               (written + cleaned) / max(written, 1), space, compacted, cpu_us, simulated, points)  # fmt: skip


def simulate(workload: str, utilisation: float, slots: int, operations: int) -> float:
    """Write amplification of the greedy simulation, in the second half of its run."""
    log = Greedy(slots, utilisation)
    log.run(iter([("store", 0, slots)]), slots)
    stream = WORKLOADS[workload](slots, Random(1))
    log.run(stream, operations)
    appended, moved = log.appended, log.moved
    log.run(stream, operations)
    return 1 + (log.moved - moved) / max(log.appended - appended, 1)


def table(runs: list[Run]) -> str:
    """Markdown."""
    head = "| workload | victims by | utilisation | written per stored | written per written back | greedy log | bound | " \
        "space | after compact | CPU us |\n|---|---|---|---|---|---|---|---|---|---|\n"  # fmt: skip
    return head + "\n".join(
        f"| {r.workload} | {r.score} | {r.utilisation:.0%} | {r.write_amplification:.2f} | {r.tier_amplification:.2f} "
        f"| {r.greedy_simulation:.2f} | {bound(r.utilisation) if r.workload == 'uniform' else 0:.2f} "
        f"| {r.space_amplification:.2f} | {r.compacted:.3f} | {r.cpu_us:.1f} |"
        for r in runs
    )


def growth(operations: int, backing: Path) -> None:
    """Print the CPU time per operation for each size, after each slot was overwritten once on average, so that cleaning goes on."""
    print("| slots | pages | CPU us per operation | written per stored |\n|---|---|---|---|")
    for gib in GIB_OF_SLOTS:
        slots = gib << 18
        tier = FileTier(backing)
        try:
            drive = Drive(slots, 0.8, benefit_per_cost, tier)
            drive.fill()
            stream = WORKLOADS["zipf"](slots, Random(1))
            drive.run(stream, slots)
            # before the measurement: drawing searches in 16 million weights
            drawn = list(islice(stream, operations))
            points = drive.run(iter(drawn), operations)
            drive.verify_some(VERIFIED)
        finally:
            tier.close()
            backing.unlink()
        cpu_us = sum(point.cpu_s for point in points) / operations * 1e6
        written = sum(point.written + point.cleaned for point in points) / sum(point.stored for point in points)
        print(f"| {gib} GiB | {slots} | {cpu_us:.1f} | {written:.2f} |", flush=True)


def picture(file: Path, runs: list[Run]) -> None:
    """Draw the amplification over time at 80%, and over utilisation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    over_time, over_utilisation, space = figure.subplots(1, 3)
    for workload in WORKLOADS:
        mine = [r for r in runs if r.workload == workload and r.score == "cost"]
        for r in mine:
            if r.utilisation == 0.8:
                rates = [(point.written + point.cleaned) / max(point.stored, 1) for point in r.points]
                over_time.plot([point.operations / 1e6 for point in r.points], rates, label=workload)
                space.plot([point.operations / 1e6 for point in r.points], [point.space_amplification for point in r.points])
        over_utilisation.plot([r.utilisation for r in mine], [r.write_amplification for r in mine], "o-", label=workload)
    over_time.set(xlabel="million operations", ylabel="bytes written per byte stored", title="80% utilisation", ylim=0)
    over_utilisation.set(xlabel="utilisation", title="steady", ylim=0)
    space.set(xlabel="million operations", title="space amplification, 80%", ylim=1)
    over_time.legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Run the workloads that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="zipf")
    parser.add_argument("--score", choices=SCORES, default="cost")
    parser.add_argument("--utilisation", type=float, default=0.8)
    parser.add_argument("--operations", type=int, default=20_000_000)
    parser.add_argument("--slots", type=int, default=131_072)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--backing", type=Path, default=Path("build/churn-backing"))
    parser.add_argument("--output", type=Path, default=Path("build/churn"))
    a = parser.parse_args()
    if a.growth:
        growth(a.operations, a.backing)
        return
    runs = []
    for workload, utilisation in [(w, u) for w in WORKLOADS for u in UTILISATIONS] if a.sweep else [(a.workload, a.utilisation)]:
        runs.append(run(workload, a.score, utilisation, a.slots, a.operations))
        print(table(runs[-1:]).splitlines()[-1] if len(runs) > 1 else table(runs), flush=True)
    a.output.mkdir(parents=True, exist_ok=True)
    (a.output / "churn.json").write_text(json.dumps([asdict(r) for r in runs], indent=1) + "\n")
    if a.sweep:
        picture(a.output / "churn.png", runs)


if __name__ == "__main__":
    main()
