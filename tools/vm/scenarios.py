"""What is done to the guest, one function per scenario. Each returns a verdict.

A scenario finds its contender up and leaves it up. What it starts ends with it. Figures of speed are those of an emulated machine:
they are reported and never judged, except where a time is so long that something must have hung.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Final

from tools.vm import evidence
from tools.vm.contenders import Tmemfs, swap_counts, unprotected
from tools.vm.environment import FILLED_S, VERIFIED_S, Guest, Hog, hogs_ended
from tools.vm.evidence import Figure, Verdict
from tools.vm.growth import mlock_growth
from tools.vm.kills import NEVER, SELDOM_S, Killer, kills
from tools.vm.watch import Watch

MIB: Final = 1 << 20
SWAPPED_SHARE: Final = 2.5
PROGRESS_S: Final = 10.0
#: What the churning program may have in RAM while everything else is locked.
PIN_FLOOR_BYTES: Final = 12 * MIB
LONGEST_GAP_S: Final = 5.0
MOST_WAKES_PER_S: Final = 1.0


def nothing_but_swap(guest: Guest) -> Verdict:
    """Two programs, one after the other, use far more memory than there is, and verify it, while workers of tmemfs are killed."""
    seconds = 600 if guest.full else 60
    size_mib = int(guest.ram_bytes * SWAPPED_SHARE) // MIB
    tested_mib = size_mib if guest.full else size_mib // 2
    stress = ["stress-ng", "--vm", "2", "--vm-bytes", f"{size_mib}M", "--vm-keep", "--verify", "--timeout", f"{seconds}s",
              "--metrics-brief", "--temp-path", "/run"]  # fmt: skip
    apptest = ["stressapptest", "-s", str(seconds), "-M", str(tested_mib), "-m", "2"]
    figures: dict[str, Figure] = {"wanted_mb": size_mib * MIB / 1e6}
    reasons = []
    pid = guest.daemon_pid()
    for name, command in (("stress-ng", stress), ("stressapptest", apptest)):
        found, wrong = _run_verifier(guest, name, command, seconds)
        figures |= found
        reasons += wrong
    reasons += evidence.judge_log(guest.log(), pid, kills_allowed=True)
    if pid is not None and not Path(f"/proc/{pid}").exists():
        reasons.append("the daemon has gone")
    stat = evidence.numbers("\n".join(f"{key} {value}" for key, value in guest.contender.stat().items()))
    reasons += [f"{key} is {stat[key]}" for key in NEVER if stat.get(key)]
    return guest.verdict("nothing-but-swap", figures, reasons)


def _run_verifier(guest: Guest, name: str, command: list[str], seconds: float) -> tuple[dict[str, Figure], list[str]]:
    """Run a program that verifies its memory; returns what it did to the swap, and what was wrong."""
    before, reasons = swap_counts(), list[str]()
    output = Path(f"/run/{name}.log")
    limit = seconds * 4 + 240
    with output.open("wb") as file, Watch(guest.contender, guest.say) as watch, _killing(guest) as killer:
        process = subprocess.Popen(unprotected(command), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   start_new_session=True)  # fmt: skip
        began = time.monotonic()
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, 9)
            process.wait(60)
        took = time.monotonic() - began
    watch.save(guest.results / f"{name}.samples")
    (guest.results / f"{name}.log").write_bytes(output.read_bytes())
    if code is None:
        reasons.append(f"{name} was still running after {limit:.0f} s")
    elif code:
        reasons.append(f"{name} ended with exit code {code}: see {name}.log")
    swapped = evidence.between(watch.swapped(), began, began + seconds)
    first = evidence.first_growth(swapped)
    swapped = evidence.between(swapped, began if first is None else first, began + seconds)  # free memory is filled before
    idle = evidence.intervals_without_progress(swapped, PROGRESS_S)
    if idle:
        reasons.append(f"{name}: no page was swapped in the 10 s from second {', '.join(f'{at:.0f}' for at in idle)}")
    after = swap_counts()
    killed = killer.figures(f"{name}_") if killer else {}
    reasons += [f"{name}: {reason}" for reason in (killer.reasons if killer else ())]
    return {**killed, f"{name}_seconds": took,
            f"{name}_pages_swapped": after[0] - before[0], f"{name}_oom_kills": after[1] - before[1],
            f"{name}_longest_gap_s": evidence.longest_gap(swapped)}, reasons  # fmt: skip


@contextmanager
def _killing(guest: Guest) -> Iterator[Killer | None]:
    """Workers killed now and then during the block, if the contender has any."""
    if not isinstance(guest.contender, Tmemfs):
        yield None
        return
    with Killer(guest, SELDOM_S, is_patient=True) as killer:
        yield killer


def low_memory(guest: Guest) -> Verdict:
    """One program keeps free memory at the minimum watermark while another causes pages to be swapped in and out."""
    with hogs_ended() as running, Watch(guest.contender, guest.say) as watch:
        churner = Hog("churn", str(guest.ram_bytes // MIB))
        running.append(churner)
        churner.wait_for("churning", FILLED_S)
        pinner = Hog("pin", str(PIN_FLOOR_BYTES >> 10))
        running.append(pinner)
        pinner.wait_for("pinning", FILLED_S)
        # by then it has pinned what it can
        time.sleep(15.0)
        start = time.monotonic()
        time.sleep(300.0 if guest.full else 45.0)
        end = time.monotonic()
        reasons = _hogs_wrong(churner, pinner)
    watch.save(guest.results / "low-memory.samples")
    completed = evidence.between(watch.series("completed"), start, end)
    gap = evidence.longest_gap(completed)
    if len(completed) < 2:
        reasons.append("nothing was seen of the swap's requests")
    elif gap >= LONGEST_GAP_S:
        reasons.append(f"no swap request was completed for {gap:.1f} s")
    reasons += evidence.judge_log(guest.log())
    figures: dict[str, Figure] = {
        "longest_gap_s": gap,
        "longest_gap_in_page_counts_s": evidence.longest_gap(evidence.between(watch.swapped(), start, end)),
        "requests_completed": completed[-1].value - completed[0].value if completed else 0,
        **_free_figures(watch, start, end),
        "pinned_mb": int(pinner.said.get("pinned", "0")) / 1e6,
        "pages_written": int(churner.said.get("written", "0")),
    }
    if isinstance(guest.contender, Tmemfs):
        figures["swap_stalls"] = int(guest.contender.stat()["pressure_swap_stalls"])
    return guest.verdict("low-memory", figures, reasons)


def _hogs_wrong(churner: Hog, pinner: Hog) -> list[str]:
    """End both hogs; returns what was wrong with them."""
    reasons = []
    # the pinner first: the churner needs memory to verify its pages
    for hog, key in ((pinner, "pinned"), (churner, "wrong")):
        hog.tell()
        if hog.wait_for(key, VERIFIED_S) is None:
            reasons.append(f"a hog did not end: exit code {hog.wait(0.5)}")
    if churner.said.get("wrong") != "0":
        reasons.append(f"pages with wrong content: {churner.said.get('wrong')}")
    return reasons


def _free_figures(watch: Watch, start: float, end: float) -> dict[str, Figure]:
    minimum = evidence.minimum_watermark_pages(Path("/proc/zoneinfo").read_text()) * 4096
    free = [sample.value for sample in evidence.between(watch.series("MemFree"), start, end)]
    return {
        "minimum_watermark_mb": minimum / 1e6,
        "free_median_mb": median(free) / 1e6 if free else 0.0,
        "free_lowest_mb": min(free, default=0.0) / 1e6,
    }


def privileges(guest: Guest) -> Verdict:
    """Whether the daemon has every protection that it asked for, according to itself and to the kernel."""
    assert isinstance(guest.contender, Tmemfs), "only tmemfs has a daemon"
    stat, figures = guest.contender.stat(), dict[str, Figure]()
    wanted = ("io_flusher", "oom_score_adj_set", "memory_locked", "watermark_boost_off")
    reasons = [f"{key} is {stat.get(key)}" for key in wanted if stat.get(key) != "1"]
    for name, pid in zip(("supervisor", "worker"), guest.daemons(), strict=True):
        found, missing = _protections(Path("/proc") / str(pid))
        figures |= {f"{name}_{key}": value for key, value in found.items()}
        reasons += [f"{name}: {reason}" for reason in missing]
    doctor = subprocess.run(unprotected([sys.executable, "-m", "tmemfs", "doctor"]), capture_output=True, text=True, timeout=120,
                            check=False)  # fmt: skip
    (guest.results / "doctor.txt").write_text(doctor.stdout + doctor.stderr)
    return guest.verdict("privileges", {**figures, "doctor_exit_code": doctor.returncode}, reasons)


def _protections(process: Path) -> tuple[dict[str, Figure], list[str]]:
    """The protections that a process has according to the kernel, and what is missing."""
    score = int((process / "oom_score_adj").read_text())
    locked = evidence.meminfo((process / "status").read_text())["VmLck"]
    # IO_FLUSHER is PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE of the thread: include/linux/sched.h
    threads = [int((task / "stat").read_text().rpartition(")")[2].split()[6]) for task in (process / "task").iterdir()]
    flushers = sum(flag & 0x00180000 == 0x00180000 for flag in threads)
    reasons = [f"oom_score_adj is {score}"] if score > -1000 else []
    reasons += [] if locked else ["no memory is locked"]
    reasons += [f"only {flushers} of {len(threads)} threads are IO flushers"] if flushers < len(threads) else []
    return {"oom_score_adj": score, "locked_mb": locked / 1e6, "threads": len(threads), "io_flusher_threads": flushers}, reasons


def quiet(guest: Guest) -> Verdict:
    """How often an idle daemon wakes, in the quietest of several windows: other programs of the machine examine a new mount."""
    daemons, seconds, windows = guest.daemons(), 5.0, list[float]()
    assert daemons, "only tmemfs has a daemon"
    time.sleep(5.0)
    for _ in range(12 if guest.full else 4):
        before = _wakes(daemons)
        time.sleep(seconds)
        after = _wakes(daemons)
        windows.append(sum(count - before.get(thread, 0) for thread, count in after.items()) / seconds)
    reasons = [] if min(windows) < MOST_WAKES_PER_S else [f"an idle daemon woke {min(windows):.1f} times per second"]
    figures: dict[str, Figure] = {"wakes_per_s_least": min(windows), "wakes_per_s_most": max(windows)}
    return guest.verdict("quiet", figures, reasons)


def _wakes(pids: list[int]) -> dict[str, int]:
    """The voluntary context switches of each thread."""
    counts = {}
    for task in chain(*(Path(f"/proc/{pid}/task").iterdir() for pid in pids)):
        with suppress(OSError):  # a thread that ended meanwhile
            counts[task.name] = int(evidence.flat((task / "status").read_text())["voluntary_ctxt_switches:"])
    return counts


SCENARIOS: Final[dict[str, Callable[[Guest], Verdict]]] = {
    "privileges": privileges,
    "quiet": quiet,
    "low-memory": low_memory,
    "kills": kills,
    "mlock-growth": mlock_growth,
    "nothing-but-swap": nothing_but_swap,
}
