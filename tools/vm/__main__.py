"""`python -m tools.vm [--full] [--scenario NAME ...] [--contender NAME ...] [--output DIR]`: a 512 MiB machine whose only swap is
tmemfs, under memory pressure.

Boots guests by software emulation, one per group of scenarios, and collects logs, counters and verdicts. zram and zswap run the
growth of locked memory too, and are only reported. Exit code 0 if every verdict on tmemfs passed; 2 if this machine lacks
something.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from tools.vm import machine
from tools.vm.evidence import Verdict, where_it_hangs

CONTENDERS: Final = ("tmemfs", "zram", "zswap")
#: Scenarios that share a guest, in this order: only a daemon that has seen no pressure yet is idle.
GROUPS: Final = (("privileges", "quiet", "low-memory", "kills"), ("mlock-growth",), ("nothing-but-swap",))
#: What zram and zswap run as well by default, and what they can run on request.
COMPARED: Final = ("mlock-growth",)
OF_ANY_SWAP: Final = ("low-memory", "mlock-growth", "nothing-but-swap")
#: Seconds a guest may take from boot to end, by scenario: short, full.
LIMITS_S: Final = {"privileges": (60, 60), "quiet": (60, 150), "low-memory": (150, 600), "kills": (200, 900),
                   "mlock-growth": (500, 900), "nothing-but-swap": (600, 4000)}  # fmt: skip
BOOT_S: Final = 240


@dataclass(frozen=True, slots=True)
class Run:
    """One guest."""

    contender: str
    scenarios: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of its directory."""
        return f"{self.contender}-{self.scenarios[0]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Boot the guests that are asked for, print the verdicts."""
    arguments = _parser().parse_args(argv)
    # as an exception, so that the guest is ended too
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    runs = plan(arguments.scenario, arguments.contender)
    try:
        machine.require(machine.environment())
        kernel = machine.newest_kernel()
    except machine.NotHere as error:
        print(f"tools.vm: {error}", file=sys.stderr)
        return 2
    output: Path = arguments.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    machine.stage(output / "tree")
    verdicts = [verdict for run in runs for verdict in boot(run, kernel, output, arguments.full, arguments.memory)]
    (output / "verdicts.json").write_text(json.dumps([{**asdict(one), "passed": one.passed} for one in verdicts], indent=2) + "\n")
    print(report(verdicts))
    return exit_code(verdicts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="ten minutes or more per scenario")
    parser.add_argument("--scenario", action="append", choices=list(LIMITS_S), help="only this one; may be repeated")
    parser.add_argument("--contender", action="append", choices=CONTENDERS, help="only this one; may be repeated")
    parser.add_argument("--memory", default=machine.MEMORY, help=f"memory of a guest ({machine.MEMORY})")
    parser.add_argument("--output", type=Path, default=Path("build/vm"), help="where results go (build/vm)")
    return parser


def plan(scenarios: Sequence[str] | None, contenders: Sequence[str] | None) -> list[Run]:
    """The guests to boot. If scenarios and contenders are not both named, zram and zswap only run what is compared."""
    runs = []
    for contender in contenders or CONTENDERS:
        possible = LIMITS_S if contender == "tmemfs" else OF_ANY_SWAP if scenarios and contenders else COMPARED
        wanted = [name for name in scenarios or LIMITS_S if name in possible]
        groups = (tuple(name for name in group if name in wanted) for group in GROUPS)
        runs += [Run(contender, group) for group in groups if group]
    return runs


def boot(run: Run, kernel: Path, output: Path, full: bool, memory: str = machine.MEMORY) -> list[Verdict]:
    """Boot one guest; returns its verdicts, a failed one for each scenario that left none."""
    results = output / run.name
    results.mkdir(exist_ok=True)
    for stale in results.iterdir():
        stale.unlink()
    program, disk = results / "program", output / f"{run.name}.disk"
    program.write_text(machine.program_text(sys.executable, output / "tree", run.contender, results, run.scenarios, full))
    program.chmod(0o755)
    print(f"{run.name}: boots", flush=True)
    began = time.monotonic()
    machine.make_disk(disk)
    try:
        limit = BOOT_S + sum(LIMITS_S[name][full] for name in run.scenarios)
        ended = machine.run(machine.Boot(kernel, disk, results, program, memory), limit, results / "console.log",
                            lambda line: print(f"{run.name}: {line}", flush=True))  # fmt: skip
    finally:
        disk.unlink(missing_ok=True)
    print(f"{run.name}: ended after {time.monotonic() - began:.0f} s: {ended or 'by itself'}", flush=True)
    return [read_verdict(run.contender, name, results, ended) for name in run.scenarios]


def read_verdict(contender: str, scenario: str, results: Path, ended: str | None) -> Verdict:
    """The verdict that the guest wrote; a guest that ended without one, or had to be ended, has failed."""
    log, hangs = results / "console.log", tuple[str, ...]()
    if ended and log.exists():
        hangs = tuple(where_it_hangs(log.read_text(errors="replace")))
    try:
        found = json.loads((results / f"{scenario}.json").read_text())
    except (OSError, ValueError):
        return Verdict(scenario, contender, {}, (f"no verdict: {ended or 'the guest ended without one'}: see {log}", *hangs))
    reasons = (*found["reasons"], *((f"{ended}: see {log}", *hangs) if ended else ()))
    return Verdict(scenario, contender, found["figures"], reasons)


def report(verdicts: Sequence[Verdict]) -> str:
    """A paragraph for each verdict."""
    lines: list[str] = []
    for verdict in verdicts:
        lines.append(f"{verdict.contender:7} {verdict.scenario:17} {'passed' if verdict.passed else 'FAILED'}")
        lines += [f"        {reason}" for reason in verdict.reasons]
        lines += [f"        {key} {value:.1f}" if isinstance(value, float) else f"        {key} {value}"
                  for key, value in verdict.figures.items()]  # fmt: skip
    return "\n".join(lines)


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """0 if every verdict on tmemfs passed."""
    return 0 if all(verdict.passed for verdict in verdicts if verdict.contender == "tmemfs") else 1


if __name__ == "__main__":
    sys.exit(main())
