"""Run inside the guest: `python -m tools.vm.guest [--full] --contender NAME --results DIR SCENARIO...`.

Mounts the disk, protects itself (it has to outlive what it watches), turns the contender on, runs the scenarios, writes
SCENARIO.json, the kernel's log and the contender's counters to DIR, and turns everything off again in any case.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final

from tools.vm.contenders import Contender, contender, run
from tools.vm.environment import Guest
from tools.vm.evidence import Verdict, meminfo
from tools.vm.scenarios import SCENARIOS

DISK: Final = Path("/run/disk")
DISK_DEVICE: Final = "/dev/vda"
#: After this time the kernel reports a hung task; its default of 120 s is longer than a short scenario.
HUNG_S: Final = 30
#: What the samples and logs of a scenario take.
HEAP_BYTES: Final = 6 << 20
_LOCK_ON_FAULT: Final = 7
_LIVES_S: Final = 30.0


def main() -> int:
    """Run the scenarios that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--contender", default="tmemfs")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("scenarios", nargs="+", choices=list(SCENARIOS))
    arguments = parser.parse_args()
    _say("begins")
    _prepare()
    threading.Thread(target=_live, daemon=True).start()
    with _up(contender(arguments.contender, DISK), arguments.results) as swap:
        ram = meminfo(Path("/proc/meminfo").read_text())["MemTotal"]
        _say(f"{swap.name} is up, RAM is {ram / 1e6:.0f} MB")
        guest = Guest(swap, arguments.results, arguments.full, ram, _say)
        for name in arguments.scenarios:
            _save(_judged(name, guest), arguments.results)
    return 0


def _say(text: str) -> None:
    print(f"vm: {time.monotonic():7.1f} {text}", flush=True)


def _live() -> None:
    """Report regularly that the guest is not hung (machine.SILENT_S)."""
    while True:
        time.sleep(_LIVES_S)
        _say("lives")


def _judged(name: str, guest: Guest) -> Verdict:
    """The verdict of a scenario, a failed one if it raises."""
    _say(f"{name}: begins")
    try:
        return SCENARIOS[name](guest)
    except Exception as error:
        traceback.print_exc()
        return guest.verdict(name, {}, [f"the scenario itself failed: {error!r}"])


def _save(verdict: Verdict, results: Path) -> None:
    (results / f"{verdict.scenario}.json").write_text(json.dumps({**asdict(verdict), "passed": verdict.passed}, indent=2) + "\n")
    _say(f"{verdict.scenario}: {'passed' if verdict.passed else 'failed'} {'; '.join(verdict.reasons)}")


def _prepare() -> None:
    """Prepare the disk, the settings of the kernel, and this process: locked, and exempt from the OOM killer."""
    DISK.mkdir(exist_ok=True)
    run("mount", "-t", "ext4", DISK_DEVICE, str(DISK))
    for module in ("fuse", "loop"):
        run("modprobe", module)
    Path("/proc/sys/kernel/hung_task_timeout_secs").write_text(str(HUNG_S))
    Path("/proc/sys/kernel/hung_task_warnings").write_text("-1")
    Path("/proc/sys/kernel/sysrq").write_text("1")
    # a guest this small needs the memory of every daemon that it can do without
    with suppress(RuntimeError, OSError):
        run("udevadm", "control", "--exit")
    Path("/proc/sys/vm/drop_caches").write_text("3")
    # the parents too: the guest ends with its first process
    for pid in _ancestry():
        with suppress(OSError):
            Path(f"/proc/{pid}/oom_score_adj").write_text("-1000")
    ctypes.CDLL(None).mlockall(_LOCK_ON_FAULT)
    # faulted in, and kept by malloc afterwards (contenders.KEPT_HEAP)
    _ = [bytes(4000) for _ in range(HEAP_BYTES // 4000)]


def _ancestry() -> Iterator[int]:
    """This process and its ancestors."""
    pid = os.getpid()
    while pid > 1:
        yield pid
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@contextmanager
def _up(swap: Contender, results: Path) -> Iterator[Contender]:
    """Turn the contender on for the block; keep its counters and the kernel's log."""
    try:
        swap.up()
        yield swap
        # while it is up, and again at the end: after a failure the second is all there is
        with suppress(OSError, KeyError):
            swap.keep(results)
        _say("down begins")
        swap.down()
        _say("down")
    finally:
        (results / "dmesg").write_text(run("dmesg"))
        with suppress(OSError):
            swap.keep(results)
        for command in (["swapoff", "-a"], ["sync"]):
            with suppress(Exception):
                run(*command, seconds=60)


if __name__ == "__main__":
    sys.exit(main())
