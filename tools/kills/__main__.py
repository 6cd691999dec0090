"""Kill the workers of two mounts again and again under load, verify every byte, and measure each stall.

    python -m tools.kills [--kills 200] [--seed N] [--stop N] [--upgrade N] [--watchdog 2s] [-- OPTION ...]

A strike is one kill, or two of which the second hits the next worker while it recovers. The moments are random; for most strikes
the worker is first made to write back, write ahead, merge, clean, recompress or shrink. With --stop a worker is stopped by SIGSTOP
instead, so that the watchdog has to replace it; with --upgrade the command is run. Options after -- are given to the mounts.

Exit codes: 0 passed; 1 a fault; 2 it cannot run here. Needs root, loop devices, a memory cgroup controller, fio and stress-ng.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random, SystemRandom
from typing import Final

from tools.cgroup import memory_controller
from tools.interrupts import interruptible
from tools.kills.deaths import Tally
from tools.kills.load import load, missing_programs
from tools.kills.machine_checks import KernelLog, kernel_faults, names_of, stuck
from tools.kills.run import Plan, Run, finish
from tools.kills.targets import targets
from tools.leftovers import Machine
from tools.soak.places import HANG_S

_SEEDS: Final = 1 << 32


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table."""
    arguments = _parser().parse_args(argv)
    missing = missing_programs()
    if os.geteuid() or memory_controller() is None or missing:
        print(f"tools.kills: needs root and a memory cgroup controller; not installed: {' '.join(missing) or '-'}", file=sys.stderr)
        return 2
    tally = Tally(arguments.seed if arguments.seed is not None else SystemRandom().randrange(_SEEDS))
    plan = Plan(arguments.kills, arguments.stop, arguments.upgrade, arguments.watchdog, arguments.seconds)
    print(f"{plan}, seed {tally.seed}", flush=True)
    with interruptible("taking everything down"):
        _run_and_clean(plan, tally, tuple(arguments.options), arguments.directory)
    print("\n".join(tally.lines()), flush=True)
    return 1 if tally.faults else 0


def _run_and_clean(plan: Plan, tally: Tally, options: tuple[str, ...], base: Path) -> None:
    """Run in a new directory, and check at the end what is left behind."""
    directory = Path(tempfile.mkdtemp(prefix="tmemfs-kills-", dir=base)).resolve()
    # before the first daemon changes any
    machine = Machine(directory, os.getpid())
    before = machine.settings()
    try:
        _run(plan, tally, options, directory)
    except Exception as error:
        tally.faults.append(f"{type(error).__name__}: {error}")
    finally:
        tally.faults += [f"left behind: {line}" for line in machine.wait(before, HANG_S / 8)]
        shutil.rmtree(directory, ignore_errors=True)


def _run(plan: Plan, tally: Tally, options: tuple[str, ...], directory: Path) -> None:
    """Mount, load, strike, judge; everything is taken down in any case."""
    log, random = KernelLog(), Random(tally.seed)
    with targets(directory, tally.seed, options, tally.requests) as both:
        devices = [name for target in both for name in names_of(target.device)]
        try:
            with load(directory, directory / "files", tally.seed, tally.verified) as programs:
                run = Run(plan, tally, both, programs, random, directory)
                began = time.monotonic()
                try:
                    run.all()
                finally:
                    tally.seconds = time.monotonic() - began
                    tally.load_average = os.getloadavg()[0]
            finish(tally, both, directory / "files")
        except BaseException:
            # now: everything is taken down next, and the logs are removed
            tally.faults += [f"the log of {target.place.name} ends: {target.place.logs()[-1500:]}" for target in both]
            raise
        finally:
            tally.faults += [f"kernel log: {line}" for line in kernel_faults(log.lines(), devices)[:10]]
            tally.faults += stuck()
            if tally.faults:
                # nothing may wait for ever for an answer while it is taken down
                for target in both:
                    target.kill()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="deaths by SIGKILL (200)")
    parser.add_argument("--stop", type=int, default=0, metavar="N", help="stop a worker by SIGSTOP N times (0)")
    parser.add_argument(
        "--upgrade",
        type=int,
        default=0,
        metavar="N",
        help="upgrade N times, in turns also to versions that cannot take over, and with a kill (0)",
    )
    parser.add_argument("--watchdog", default="2s", help="the watchdog for --stop (2s)")
    parser.add_argument("--seconds", type=float, default=0.0, help="go on without kills for this long (0)")
    parser.add_argument("--seed", type=int, help="choose the moments (a random seed, which is printed)")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="where to put everything (/var/tmp)")
    parser.add_argument("options", nargs="*", metavar="OPTION", help="options of the mounts, after --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
