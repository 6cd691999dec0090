"""`python -m tools.bench.peers [--quick] [--rounds N] [--only NAME,...] [--parts PART,...] [--pages FILE] [--output DIR] [...]`

tmemfs compared with zram, zswap, a plain swap file, and a null FUSE server (tools/floor). Each contender is turned on alone, in
rounds: A B C, A B C, ... A figure is the median over the rounds; a goal is judged by the median of the rounds' ratios. Writes
peers.json (after every part), peers.md and peers.png. Needs root, FUSE, gcc, fio, stress-ng, no other swap, and some GiB below DIR.
A program of the part 'real' that is not installed is left out. Leaves nothing behind, even when interrupted. Exit code 1 if a part
failed; a missed goal is a result.
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
from tools.bench import goals, peers_plot, programs, real, workloads
from tools.bench.contenders import Contender, Limits, NotAlone, Swap, all_contenders, refuse_other_swaps, turned_on
from tools.bench.statistics import Sample
from tools.bench.toucher import write_base
from tools.bench.workloads import Figures
from tools.interrupts import interruptible
from tools.warm import use_memory

PARTS: Final = ("ample", "stress", "real", "overcommit", "fio")
_NOT_QUICK: Final = ("real",)
_KEPT_FREE: Final = 12 << 30
#: More than any contender needs.
_USED_BEFORE: Final = 8 << 30
#: zswap's limit is a whole percent of RAM; tmemfs gets the same.
_POOL_PERCENT: Final = 1
_TRIES: Final = 4


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

    @property
    def base(self) -> Path:
        """The file of pages."""
        return self.directory / "base"


@dataclass(slots=True)
class Results:
    """What was measured so far."""

    machine: dict[str, Any]
    missing: dict[str, str]
    samples: list[Sample] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> Results:
        """The results that `write` wrote."""
        kept = json.loads(file.read_text())
        return cls(**{**kept, "samples": [Sample(**one) for one in kept["samples"]]})

    def write(self, file: Path) -> None:
        """Write JSON, the whole of it or nothing."""
        fresh = file.with_suffix(".fresh")
        fresh.write_text(json.dumps(asdict(self), indent=1) + "\n")
        fresh.replace(file)


def main() -> int:
    """Measure, write and print."""
    arguments = _arguments()
    if arguments.report:
        report(Results.read(arguments.output / "peers.json"), arguments.output)
        return 0
    require_root()
    try:
        refuse_other_swaps(wait_s=arguments.wait)
        if available_ram_bytes() < _KEPT_FREE:
            raise SystemExit(f"less than {_KEPT_FREE >> 30} GiB of RAM are free: the figures would not mean what they should")
        arguments.output.mkdir(parents=True, exist_ok=True)
        with (
            interruptible("turning everything off"),
            tempfile.TemporaryDirectory(prefix="tmemfs-peers-", dir=arguments.directory) as place,
        ):
            plan, missing = _plan(arguments, Path(place))
            results = Results(_machine(plan), missing)
            shutil.copyfile(arguments.pages, plan.base) if arguments.pages else write_base(plan.base)
            use_memory(_USED_BEFORE)
            for number in range(plan.rounds):
                run_round(plan, number, results, arguments.output / "peers.json")
    except TmemfsError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    report(results, arguments.output)
    return 1 if results.failures else 0


def run_round(plan: Plan, number: int, results: Results, file: Path) -> None:
    """Run everything once, each part with every contender before the next part; write the results so far to `file`."""
    results.loads.append(Path("/proc/loadavg").read_text().strip())
    results.samples.append(Sample(number, "lz4", "codec", programs.codec(plan.base)))
    for part in plan.parts:
        for contender in plan.contenders:
            began = time.monotonic()
            samples, failure = _tried(plan, part, contender, number)
            results.samples += samples
            if failure:
                results.failures.append({"round": number, "contender": contender.name, "part": part, "error": failure})
            said = failure or f"{time.monotonic() - began:.1f} s"
            print(f"round {number} {part} {contender.name}: {said}", file=sys.stderr, flush=True)
            results.write(file)


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


def report(results: Results, output: Path) -> None:
    """Print and write the tables, and draw the picture."""
    contenders = list(dict.fromkeys(one.contender for one in results.samples if one.workload in ("ram", "fill", "stress-vm")))
    judged = goals.verdicts(results.samples)
    left_out = "".join(f"- {name}: {reason}\n" for name, reason in results.missing.items())
    failed = "".join(f"- {one}\n" for one in results.failures)
    text = "\n".join(
        [goals.goal_table(judged), goals.contender_table(results.samples, contenders), goals.real_table(results.samples),
         goals.overcommit_table(results.samples), goals.fio_table(results.samples),
         f"Left out:\n\n{left_out}", f"Failed:\n\n{failed or '- nothing'}\n"]
    )  # fmt: skip
    (output / "peers.md").write_text(text)
    print(text)
    peers_plot.plot(output / "peers.png", results.samples, contenders)


def _part(plan: Plan, part: str, contender: Contender, number: int) -> Iterator[tuple[str, Figures]]:
    sizes, seed = plan.sizes, number + 1
    if part == "ample":
        with turned_on(contender, plan.directory, Limits(sizes.swap_bytes), wait_s=plan.wait_s) as swap:
            yield from _alone(swap, workloads.ample(swap, plan.base, sizes, seed, contender.sources))
    elif part == "stress":
        with turned_on(contender, plan.directory, Limits(sizes.swap_bytes), wait_s=plan.wait_s) as swap:
            yield from _alone(swap, programs.stress(swap, sizes.limit_bytes, plan.stress_s))
    elif part == "real" and contender.kind != "floor":
        with turned_on(contender, plan.directory, Limits(real.SIZES.swap_bytes), wait_s=plan.wait_s) as swap:
            yield from _alone(swap, real.programs(real.Stage(swap, plan.base, plan.directory / "real", real.SIZES, seed)))
    elif part == "overcommit" and contender.kind in ("tmemfs", "zswap", "plain"):
        pool_bytes, ratio = total_ram_bytes() * _POOL_PERCENT // 100, programs.codec(plan.base)["ratio"]
        for times in sizes.overcommit:
            working = workloads.Overcommit.of(pool_bytes, ratio, times)
            limits = Limits(working.swap_bytes, _POOL_PERCENT)
            with turned_on(contender, plan.directory, limits, wait_s=plan.wait_s) as swap:
                yield from _alone(swap, workloads.overcommitted(swap, plan.base, working, sizes.accesses, seed))
    elif part == "fio" and contender.kind in ("tmemfs", "floor"):
        limits = Limits(8 * plan.fio.file_bytes)
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
    parser.add_argument("--report", action="store_true", help="measure nothing: make tables and picture from peers.json")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="where peers.json, peers.md and peers.png go")
    arguments = parser.parse_args()
    arguments.parts = arguments.parts or ",".join(part for part in PARTS if not (arguments.quick and part in _NOT_QUICK))
    if unknown := set(arguments.parts.split(",")) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    return arguments


def pages_file(text: str) -> Path:
    """A file of whole pages. Raises ArgumentTypeError."""
    file = Path(text)
    size = file.stat().st_size if file.is_file() else 0
    if not size or size % PAGE_BYTES:
        raise argparse.ArgumentTypeError(f"{text} is no file of whole pages: make some with 'sudo make corpus'")
    return file


def _plan(arguments: argparse.Namespace, place: Path) -> tuple[Plan, dict[str, str]]:
    contenders, missing = all_contenders()
    if "real" in arguments.parts.split(","):
        missing |= {f"{name}, of real": reason for name, reason in real.missing().items()}
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
        "pool_percent": _POOL_PERCENT,
    }


if __name__ == "__main__":
    sys.exit(main())
