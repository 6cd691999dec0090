"""`python -m tools.bench.peers [--quick] [--rounds N] [--only NAME,...] [--parts PART,...] [--disk KIND] [--output DIR] [...]`

tmemfs compared with zram, zswap, a plain swap file, and a null FUSE server (tools/floor). Each contender is turned on alone, in
rounds: A B C, A B C, ... A figure is the median over the rounds; a goal is judged by the median of the rounds' ratios. Writes
peers.json (after every part), peers.md and peers.png; with --disk, --page-cluster or --qos, which hold for all contenders alike,
the names say so: peers-cloud.json. Then tools.bench.summary makes one page of all. Needs root, FUSE, gcc, fio, stress-ng, no other
swap, and some GiB below DIR. A program that is not installed is left out. Leaves nothing behind, even when interrupted; the next
run restores what one that was killed has left (settings.py). Exit code 1 if a part failed, or if the disk did more than its limits
allow; a missed goal is a result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from tmemfs.errors import TmemfsError
from tmemfs.system.capabilities import require_root
from tmemfs.system.memory import available_ram_bytes, total_ram_bytes
from tmemfs.system.swapdev import swap_entries
from tmemfs.units import PAGE_BYTES
from tools.bench import goals, peers_plot, programs, real, resume, summary, tables, workloads
from tools.bench.conditions import Conditions, add_options
from tools.bench.contenders import Contender, Limits, NotAlone, Swap, all_contenders, refuse_other_swaps, turned_on
from tools.bench.disk import DiskLimits
from tools.bench.disk_probe import probe
from tools.bench.disk_watch import Check, DiskWatch
from tools.bench.statistics import Sample
from tools.bench.toucher import write_base
from tools.bench.workloads import Figures
from tools.interrupts import interruptible
from tools.warm import use_memory

PARTS: Final = ("ample", "stress", "real", "overcommit", "resume-ram", "resume-disk", "fio")
_NOT_QUICK: Final = ("real", "resume-ram", "resume-disk")
_KEPT_FREE: Final = 12 << 30
#: More than any contender needs.
_USED_BEFORE: Final = 8 << 30
#: zswap's limit is a whole percent of RAM; tmemfs gets the same.
_POOL_PERCENT: Final = 1
_TRIES: Final = 4
#: Of a table.
_HEAD_LINES: Final = 2
#: The kinds of contenders that a program can be resumed from, by where its pages are.
_RESUMED: Final = {"resume-ram": ("tmemfs", "zram", "zswap"), "resume-disk": ("tmemfs", "zswap", "plain")}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run, and how often."""

    contenders: list[Contender]
    parts: tuple[str, ...]
    rounds: int
    sizes: workloads.Sizes
    fio: programs.FioPlan
    stress_s: int
    directory: Path
    wait_s: float
    disk: DiskLimits
    resume_sizes: resume.ResumeSizes
    resumed: tuple[str, ...]

    @property
    def base(self) -> Path:
        """The file of pages."""
        return self.directory / "base"

    def limits(self, swap_bytes: int, pool_percent: int | None = None) -> Limits:
        """The limits of a swap on the disk of this plan."""
        return Limits(swap_bytes, pool_percent, self.disk.profile.is_limited)


@dataclass(slots=True)
class Results:
    """What was measured so far."""

    machine: dict[str, Any]
    missing: dict[str, str]
    samples: list[Sample] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> Results:
        """The results that `write` wrote."""
        kept = json.loads(file.read_text())
        samples, checks = [Sample(**one) for one in kept["samples"]], [Check(**one) for one in kept.get("checks", [])]
        return cls(**{**kept, "samples": samples, "checks": checks})

    def write(self, file: Path) -> None:
        """Write JSON, the whole of it or nothing."""
        fresh = file.with_suffix(".fresh")
        fresh.write_text(json.dumps(asdict(self), indent=1) + "\n")
        fresh.replace(file)


def main() -> int:
    """Measure, write and print."""
    arguments = _arguments()
    conditions = Conditions.of(arguments)
    file: Path = arguments.output / ("peers.json" if conditions == Conditions() else f"peers-{conditions.name}.json")
    if arguments.report:
        report(Results.read(file), file)
        return 0
    require_root()
    try:
        refuse_other_swaps(wait_s=arguments.wait)
        if available_ram_bytes() < _KEPT_FREE:
            raise SystemExit(f"less than {_KEPT_FREE >> 30} GiB of RAM are free: the figures would not mean what they should")
        arguments.output.mkdir(parents=True, exist_ok=True)
        with (
            interruptible("turning everything off"),
            conditions.applied(arguments.directory) as disk,
            tempfile.TemporaryDirectory(prefix="tmemfs-peers-", dir=arguments.directory) as place,
        ):
            plan, missing = _plan(arguments, Path(place), disk)
            results = Results({**_machine(plan), "conditions": conditions.record}, missing)
            shutil.copyfile(arguments.pages, plan.base) if arguments.pages else write_base(plan.base)
            use_memory(_USED_BEFORE)
            if plan.disk.profile.is_limited:
                results.checks.append(probe(disk, Path(place)))
                print(results.checks[-1].text, file=sys.stderr, flush=True)
            for number in range(plan.rounds):
                run_round(plan, number, results, file)
    except TmemfsError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    report(results, file)
    return 1 if results.failures else 0


def run_round(plan: Plan, number: int, results: Results, file: Path) -> None:
    """Run everything once, each part with every contender before the next part; write the results so far to `file`."""
    results.loads.append(Path("/proc/loadavg").read_text().strip())
    results.samples.append(Sample(number, "lz4", "codec", programs.codec(plan.base)))
    for part in plan.parts:
        for contender in plan.contenders:
            _run_part(plan, part, contender, number, results)
            results.write(file)


def _run_part(plan: Plan, part: str, contender: Contender, number: int, results: Results) -> None:
    """Add what was measured, and what the disk did meanwhile."""
    began = time.monotonic()
    with DiskWatch(plan.disk) as watch:
        samples, failure = _tried(plan, part, contender, number)
    results.samples += samples
    check = Check.of(number, contender.name, part, watch.samples, plan.disk.profile.limits)
    for error in filter(None, (failure, check.excess)):
        results.failures.append({"round": number, "contender": contender.name, "part": part, "error": error})
    # a part that this contender has not
    if samples or failure:
        results.checks.append(check)
        said = failure or f"{time.monotonic() - began:.1f} s"
        print(f"round {number} {part} {contender.name}: {said}\n{check.text}", file=sys.stderr, flush=True)


def _tried(plan: Plan, part: str, contender: Contender, number: int) -> tuple[list[Sample], str]:
    """One part, repeated if another swap interfered; returns what was measured, and why no more was."""
    for left in reversed(range(_TRIES if plan.wait_s else 1)):
        samples = []
        try:
            for name, figures in _part(plan, part, contender, number):
                samples.append(Sample(number, contender.name, name, figures))
            return samples, ""
        except NotAlone as error:
            failure = str(error)
            samples = samples if not left else []
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            if not swap_entries() or not left:
                break
    return samples, failure


def report(results: Results, file: Path) -> None:
    """Print and write the summary and the tables, and draw the picture, beside the results in `file`."""
    contenders = list(dict.fromkeys(one.contender for one in results.samples if one.workload in ("ram", "fill", "stress-vm")))
    judged = goals.verdicts(results.samples)
    left_out = "".join(f"- {name}: {reason}\n" for name, reason in results.missing.items())
    failed = "".join(f"- {one}\n" for one in results.failures)
    found = [
        goals.goal_table(judged), goals.contender_table(results.samples, contenders), goals.real_table(results.samples),
        goals.overcommit_table(results.samples), tables.resume_table(results.samples), tables.wear_table(results.samples),
        tables.kills_table(results.samples), goals.fio_table(results.samples), tables.disk_table(results.checks),
    ]  # fmt: skip
    text = "\n".join([
        summary.of_run(results.machine, results.samples, [asdict(one) for one in results.checks]),
        *(table for table in found if table.count("\n") > _HEAD_LINES),
        f"Left out:\n\n{left_out}", f"Failed:\n\n{failed or '- nothing'}\n",
    ])  # fmt: skip
    file.with_suffix(".md").write_text(text)
    print(text)
    peers_plot.plot(file.with_suffix(".png"), results.samples, contenders)


def _part(plan: Plan, part: str, contender: Contender, number: int) -> Iterator[tuple[str, Figures]]:
    sizes, seed = plan.sizes, number + 1
    if part == "ample":
        with turned_on(contender, plan.directory, plan.limits(sizes.swap_bytes), wait_s=plan.wait_s) as swap:
            yield from _alone(swap, workloads.ample(swap, plan.base, sizes, seed, contender.sources))
    elif part == "stress":
        with turned_on(contender, plan.directory, plan.limits(sizes.swap_bytes), wait_s=plan.wait_s) as swap:
            yield from _alone(swap, programs.stress(swap, sizes.limit_bytes, plan.stress_s))
    elif part == "real" and contender.kind != "floor":
        with turned_on(contender, plan.directory, plan.limits(real.SIZES.swap_bytes), wait_s=plan.wait_s) as swap:
            yield from _alone(swap, real.programs(real.Stage(swap, plan.base, plan.directory / "real", real.SIZES, seed)))
    elif part == "overcommit" and contender.kind in ("tmemfs", "zswap", "plain"):
        pool_bytes, ratio = total_ram_bytes() * _POOL_PERCENT // 100, programs.codec(plan.base)["ratio"]
        for times in sizes.overcommit:
            working = workloads.Overcommit.of(pool_bytes, ratio, times)
            limits = plan.limits(working.swap_bytes, _POOL_PERCENT)
            with turned_on(contender, plan.directory, limits, wait_s=plan.wait_s) as swap:
                yield from _alone(swap, workloads.overcommitted(swap, plan.base, working, sizes.accesses, seed))
    elif contender.kind in _RESUMED.get(part, ()):
        limits = plan.limits(plan.resume_sizes.swap_bytes, _POOL_PERCENT if part == "resume-disk" else None)
        with turned_on(contender, plan.directory, limits, wait_s=plan.wait_s) as swap:
            stage = resume.ResumeStage(swap, plan.base, plan.directory / "resume", plan.resume_sizes)
            yield from _alone(swap, resume.resumed(part, stage, plan.resumed))
    elif part == "fio" and contender.kind in ("tmemfs", "floor"):
        limits = plan.limits(8 * plan.fio.file_bytes)
        with turned_on(contender, plan.directory, limits, swap=False, wait_s=plan.wait_s) as swap:
            yield from _alone(swap, programs.fio(swap, plan.directory, plan.fio))


def _alone(swap: Swap, measured: Iterator[tuple[str, Figures]]) -> Iterator[tuple[str, Figures]]:
    """What was measured while no other swap was on. Raises Refused if one was turned on."""
    for one in measured:
        refuse_other_swaps(swap.device)
        yield one


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one compressor of each, smaller sets, one round: about 2 minutes")
    parser.add_argument("--rounds", type=int, help="number of rounds (5; 1 with --quick)")
    parser.add_argument("--only", help="these contenders, separated by commas")
    parser.add_argument("--parts", help=f"of {','.join(PARTS)} (all; with --quick not {','.join(_NOT_QUICK)})")
    parser.add_argument(
        "--wait", type=float, default=0, metavar="S", help="wait this long until another swap is off, and try again (0)"
    )
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="where swap files and backing files go")
    parser.add_argument(
        "--pages", type=pages_file, metavar="FILE", help="swap these pages, from tools.corpus (those of a Python heap)"
    )
    parser.add_argument("--idle", type=float, default=2, metavar="S", help="how long a program idles before it is resumed (2)")
    parser.add_argument(
        "--resumed", default=",".join(resume.PROGRAMS), help="which programs are resumed, separated by commas (all)"
    )
    add_options(parser)
    parser.add_argument("--report", action="store_true", help="measure nothing: make tables and picture from peers.json")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="where peers.json, peers.md and peers.png go")
    arguments = parser.parse_args()
    arguments.parts = arguments.parts or ",".join(part for part in PARTS if not (arguments.quick and part in _NOT_QUICK))
    for option, known in (("parts", PARTS), ("resumed", resume.PROGRAMS)):
        if unknown := set(getattr(arguments, option).split(",")) - set(known):
            parser.error(f"--{option}: none of {','.join(known)}: {', '.join(sorted(unknown))}")
    return arguments


def pages_file(text: str) -> Path:
    """A file of whole pages. Raises ArgumentTypeError."""
    file = Path(text)
    size = file.stat().st_size if file.is_file() else 0
    if not size or size % PAGE_BYTES:
        raise argparse.ArgumentTypeError(f"{text} is no file of whole pages: make some with 'sudo make corpus'")
    return file


def _plan(arguments: argparse.Namespace, place: Path, disk: DiskLimits) -> tuple[Plan, dict[str, str]]:
    contenders, missing = all_contenders()
    for part, absent in (("real", real.missing()), *((part, resume.missing()) for part in _RESUMED)):
        if part in arguments.parts.split(","):
            missing |= {f"{name}, of {part}": reason for name, reason in absent.items()}
    if arguments.only:
        contenders = [one for one in contenders if one.name in arguments.only.split(",")]
    elif arguments.quick:
        contenders = _one_of_each(contenders)
    quick: bool = arguments.quick
    sizes = workloads.QUICK if quick else workloads.FULL
    plan = Plan(
        contenders,
        tuple(part for part in PARTS if part in arguments.parts.split(",")),
        arguments.rounds or (1 if quick else 5),
        sizes,
        programs.QUICK if quick else programs.FULL,
        3 if quick else 6,
        place,
        arguments.wait,
        disk,
        resume.ResumeSizes.of(total_ram_bytes() * _POOL_PERCENT // 100, arguments.idle),
        tuple(arguments.resumed.split(",")),
    )
    return plan, missing


def _one_of_each(contenders: list[Contender]) -> list[Contender]:
    """The first of each kind; of zram, the one with the codec of tmemfs."""
    preferred = sorted(contenders, key=lambda one: one.name != "zram-lz4")
    first = {kind: next(one for one in preferred if one.kind == kind) for kind in dict.fromkeys(one.kind for one in contenders)}
    return list(first.values())


def _machine(plan: Plan) -> dict[str, Any]:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()

    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "ram_bytes": total_ram_bytes(),
        "commit": git("rev-parse", "--short", "HEAD"),
        "changed": git("status", "--porcelain", "--untracked-files=no").splitlines(),
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rounds": plan.rounds,
        "parts": plan.parts,
        "sizes": asdict(plan.sizes),
        "real": asdict(real.SIZES),
        "resume": asdict(plan.resume_sizes),
        "pool_percent": _POOL_PERCENT,
    }


if __name__ == "__main__":
    sys.exit(main())
