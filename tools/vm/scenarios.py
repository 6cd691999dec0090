"""What is done to the guest, one function a scenario, and what is made of it: each gives a verdict.

A scenario finds its contender up and leaves it up. Whatever it starts ends with it. Figures of speed are of an emulated machine:
they are reported and never judged, except where a time is so long that something must have hung.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from tools.vm import evidence
from tools.vm.contenders import Contender, Tmemfs, swap_counts, unprotected
from tools.vm.evidence import Figure, Verdict
from tools.vm.watch import Watch

MIB: Final = 1 << 20
HOGS: Final = Path(__file__).with_name("hogs.py")
#: Of RAM: what the pool holds before the growth, and what the growth locks.
POOL_SHARE: Final = 0.40
LOCKED_SHARE: Final = 0.80
#: Left of what is available: the grower's interpreter, page tables, the watermarks, pages on their way to the swap. With 20 MiB the
#: grower was killed when the pool held its least, 8 MB, and 16 MB were being written to the swap.
MARGIN_BYTES: Final = 36 * MIB
SWAPPED_SHARE: Final = 2.5
IDLE_MIB: Final = 48
MOST_IDLE: Final = 20
#: Memory stays locked for so long at most while the command is tried.
HOLD_S: Final = 200.0
PROGRESS_S: Final = 10.0
#: What the churning program may have in RAM while all else is locked.
PIN_FLOOR_BYTES: Final = 12 * MIB
LONGEST_GAP_S: Final = 5.0
MOST_WAKES_PER_S: Final = 1.0
#: What a program may take that is not stuck, in an emulated machine.
COLD_START_S: Final = 60.0
FILLED_S: Final = 120.0
GROWN_S: Final = 240.0
VERIFIED_S: Final = 240.0
#: Words for tmemfs under full pressure, the exit codes they may have, and what is said; a shrink may fall short, with its reason.
COLD_STARTS: Final = (
    (("shrink", "1M"), (0, 1), "reason"),
    (("set", "pool.max=50%"), (0,), ""),
    (("down",), (2,), "are swapped out"),
)


@dataclass(frozen=True, slots=True)
class Guest:
    """The machine a scenario runs on."""

    contender: Contender
    results: Path
    full: bool
    ram_bytes: int
    say: Callable[[str], None]

    def log(self) -> str:
        """The kernel's log since boot."""
        return subprocess.run(["dmesg"], capture_output=True, text=True, timeout=60, check=False).stdout

    def daemon_pid(self) -> int | None:
        """The process of the contender, if it has one."""
        pid = self.contender.stat().get("daemon_pid")
        return int(pid) if pid else None

    def verdict(self, scenario: str, figures: dict[str, Figure], reasons: list[str]) -> Verdict:
        """A verdict on this guest's contender."""
        return Verdict(scenario, self.contender.name, figures, tuple(reasons))


class Hog:
    """A program of hogs.py: what it said, and what it is told."""

    def __init__(self, *arguments: str) -> None:
        command = unprotected([sys.executable, "-I", "-S", str(HOGS), *arguments])
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._buffer = b""
        self.said: dict[str, str] = {}

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def wait_for(self, key: str, seconds: float) -> str | None:
        """The next value it says under `key`; None if it ends or takes longer."""
        deadline = time.monotonic() + seconds
        assert self._process.stdout is not None
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                name, _, value = line.decode().partition(" ")
                self.said[name] = value
                if name == key:
                    return value
                continue
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                return None
            more = os.read(self._process.stdout.fileno(), 65536)
            if not more:
                return None
            self._buffer += more

    def tell(self) -> bool:
        """Send a line; whether it is there to get one."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"\n")
        except OSError:
            return False
        return True

    def wait(self, seconds: float) -> int | None:
        """Its exit code, negative if a signal ended it; None if it goes on."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        """Kill it, if it still runs."""
        self._process.kill()
        self.wait(60)


@contextmanager
def hogs_ended() -> Iterator[list[Hog]]:
    """A list of hogs; what is in it at the end is ended."""
    running: list[Hog] = []
    try:
        yield running
    finally:
        for hog in running:
            hog.end()


def mlock_growth(guest: Guest) -> Verdict:
    """Idle processes fill the pool; then one locks nearly all RAM, page by page."""
    size = lockable_bytes(guest.ram_bytes, evidence.meminfo(Path("/proc/meminfo").read_text())["MemAvailable"])
    with hogs_ended() as running, Watch(guest.contender, guest.say) as watch:
        reasons = _fill_pool(guest, running)
        filled, began = guest.contender.pool_bytes(), time.monotonic()
        guest.say(f"growth to {size / 1e6:.0f} MB begins")
        grower = Hog("mlock", str(size), str(HOLD_S))
        reasons += _grow(grower, guest)
        grower.end()
        ended, counted = time.monotonic(), {key: value for key, value in guest.contender.stat().items() if "pressure" in key}
        reasons += _verify(guest, running)
    watch.save(guest.results / "mlock-growth.samples")
    reasons += evidence.judge_log(guest.log())
    figures: dict[str, Figure] = {
        "pool_filled_mb": filled / 1e6,
        "pool_filled_percent": 100 * filled / guest.ram_bytes,
        "idle_processes": len(running),
        "to_lock_percent": 100 * size / guest.ram_bytes,
        "oom_kills": swap_counts()[1],
        **_growth_figures(grower, watch, began, ended),
        **counted,
    }
    return guest.verdict("mlock-growth", figures, reasons)


def lockable_bytes(ram_bytes: int, available_bytes: int) -> int:
    """What the growth locks: LOCKED_SHARE of RAM, or, in a guest so small, what was available with an empty pool, but for a margin.

    More than that is not there, whoever gives back everything: kernel, daemon and observer take the rest.
    """
    return min(int(ram_bytes * LOCKED_SHARE), available_bytes - MARGIN_BYTES)


def _fill_pool(guest: Guest, running: list[Hog]) -> list[str]:
    wanted = guest.ram_bytes * POOL_SHARE
    while guest.contender.pool_bytes() <= wanted:
        if len(running) == MOST_IDLE:
            return [f"{MOST_IDLE} idle processes did not fill the pool to {POOL_SHARE:.0%} of RAM"]
        running.append(Hog("idle", str(len(running)), str(IDLE_MIB)))
        if running[-1].wait_for("filled", FILLED_S) is None:
            return [f"idle process {len(running)} did not get its {IDLE_MIB} MiB in {FILLED_S:.0f} s"]
        guest.say(f"{len(running)} idle processes, pool {guest.contender.pool_bytes() / 1e6:.0f} MB")
    return []


def _grow(grower: Hog, guest: Guest) -> list[str]:
    if grower.wait_for("seconds", GROWN_S) is None:
        code = grower.wait(0.5)
        if code is None:
            return [f"the growth was stuck after {GROWN_S:.0f} s, at {grower.said.get('locked')} bytes"]
        return [f"the growing program ended with {code} at {grower.said.get('locked', '0')} bytes or more"]
    guest.say(f"grew in {grower.said['seconds']} s")
    reasons = _command_works(guest) if isinstance(guest.contender, Tmemfs) else []
    grower.tell()
    if grower.wait_for("wrong", VERIFIED_S) != "0":
        reasons.append(f"the growing program's own pages: {grower.said.get('wrong', 'it ended before they were verified')}")
    grower.wait(60)
    return reasons


def _command_works(guest: Guest) -> list[str]:
    """While all that can be is locked: a shrink answers, a limit is taken, and `down` refuses; nobody is killed for it."""
    reasons = []
    for words, codes, said in COLD_STARTS:
        began = time.monotonic()
        command = unprotected([sys.executable, "-m", "tmemfs", *words])
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COLD_START_S, check=False)
        except subprocess.TimeoutExpired:
            reasons.append(f"tmemfs {' '.join(words)} did not end in {COLD_START_S:.0f} s under pressure")
            continue
        answer = f"{done.stdout}{done.stderr}".strip()
        guest.say(f"tmemfs {' '.join(words)}: exit code {done.returncode} after {time.monotonic() - began:.0f} s: {answer!r}")
        if done.returncode not in codes or said not in answer:
            reasons.append(f"tmemfs {' '.join(words)} under pressure: exit code {done.returncode}: {answer}")
    return reasons


def _verify(guest: Guest, running: list[Hog]) -> list[str]:
    reasons = []
    for number, hog in enumerate(running, 1):
        wrong = hog.wait_for("wrong", VERIFIED_S) if hog.tell() else None
        if wrong is None:
            reasons.append(f"idle process {number}: its pages were not verified, exit code {hog.wait(0.5)}")
        elif wrong != "0":
            reasons.append(f"idle process {number}: {wrong} pages were wrong")
        guest.say(f"idle process {number} verified: {wrong} wrong")
    return reasons


def _growth_figures(grower: Hog, watch: Watch, began: float, ended: float) -> dict[str, Figure]:
    """How fast it grew and the pool fell; how long after the first sign of pressure the first frame was given back."""
    locked = evidence.between(watch.series("Mlocked"), began, ended)
    pool = evidence.between(watch.pool, began, ended)
    scanned = evidence.between(watch.series("pgscan_kswapd", "pgscan_direct"), began, ended)
    figures: dict[str, Figure] = {
        "locked_mb": max((sample.value for sample in locked), default=0) / 1e6,
        "pool_lowest_mb": min((sample.value for sample in pool), default=0) / 1e6,
        "pool_released_mb_per_s": evidence.steady_fall(pool) / 1e6,
        "pool_released_fastest_mb_per_s": evidence.fastest_fall(pool) / 1e6,
    }
    if "seconds" in grower.said:
        figures["growth_mb_per_s"] = float(grower.said["size"]) / 1e6 / float(grower.said["seconds"])
    pressed, released = evidence.first_growth(scanned), evidence.first_fall(pool, MIB)
    if pressed is not None and released is not None:
        figures["first_pressure_to_first_frame_s"] = released - pressed
    return figures


def nothing_but_swap(guest: Guest) -> Verdict:
    """Two programs that want far more memory than there is, one after the other, and verify what they get back."""
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
    reasons += [f"{key} is {stat[key]}" for key in ("corrupt_records", "read_errors", "write_errors") if stat.get(key)]
    return guest.verdict("nothing-but-swap", figures, reasons)


def _run_verifier(guest: Guest, name: str, command: list[str], seconds: float) -> tuple[dict[str, Figure], list[str]]:
    """Run a program that verifies its memory; what it did to the swap, and what was wrong."""
    before, reasons = swap_counts(), list[str]()
    output = Path(f"/run/{name}.log")
    limit = seconds * 4 + 240
    with output.open("wb") as file, Watch(guest.contender, guest.say) as watch:
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
    return {f"{name}_seconds": took, f"{name}_pages_swapped": after[0] - before[0], f"{name}_oom_kills": after[1] - before[1],
            f"{name}_longest_gap_s": evidence.longest_gap(swapped)}, reasons  # fmt: skip


def low_memory(guest: Guest) -> Verdict:
    """One program keeps free memory at the minimum watermark while another makes pages be swapped in and out."""
    seconds = 300.0 if guest.full else 45.0
    reasons: list[str] = []
    with hogs_ended() as running, Watch(guest.contender, guest.say) as watch:
        churner = Hog("churn", str(guest.ram_bytes // MIB))
        running.append(churner)
        churner.wait_for("churning", FILLED_S)
        pinner = Hog("pin", str(PIN_FLOOR_BYTES >> 10))
        running.append(pinner)
        pinner.wait_for("pinning", FILLED_S)
        time.sleep(15.0)  # it has pinned then
        start = time.monotonic()
        time.sleep(seconds)
        end = time.monotonic()
        for hog, key in ((pinner, "pinned"), (churner, "wrong")):
            hog.tell()
            if hog.wait_for(key, VERIFIED_S) is None:
                reasons.append(f"a hog did not end: exit code {hog.wait(0.5)}")
    watch.save(guest.results / "low-memory.samples")
    if churner.said.get("wrong") != "0":
        reasons.append(f"pages that came back wrong: {churner.said.get('wrong')}")
    completed = evidence.between(watch.series("completed"), start, end)
    gap = evidence.longest_gap(completed)
    if len(completed) < 2:
        reasons.append("nothing was seen of the swap's requests")
    elif gap >= LONGEST_GAP_S:
        reasons.append(f"no swap request was completed for {gap:.1f} s")
    reasons += evidence.judge_log(guest.log())
    minimum = evidence.minimum_watermark_pages(Path("/proc/zoneinfo").read_text()) * 4096
    free = [sample.value for sample in evidence.between(watch.series("MemFree"), start, end)]
    figures: dict[str, Figure] = {
        "longest_gap_s": gap,
        "longest_gap_in_page_counts_s": evidence.longest_gap(evidence.between(watch.swapped(), start, end)),
        "requests_completed": completed[-1].value - completed[0].value if completed else 0,
        "minimum_watermark_mb": minimum / 1e6,
        "free_median_mb": median(free) / 1e6 if free else 0.0,
        "free_lowest_mb": min(free, default=0.0) / 1e6,
        "pinned_mb": int(pinner.said.get("pinned", "0")) / 1e6,
        "pages_written": int(churner.said.get("written", "0")),
    }
    if isinstance(guest.contender, Tmemfs):
        figures["standstills"] = int(guest.contender.stat()["pressure_swap_stalls"])
    return guest.verdict("low-memory", figures, reasons)


def privileges(guest: Guest) -> Verdict:
    """Whether the daemon has every protection that it asked for, by its own word and by the kernel's."""
    assert isinstance(guest.contender, Tmemfs), "only tmemfs has a daemon"
    stat = guest.contender.stat()
    process = Path("/proc") / stat["daemon_pid"]
    score = process.joinpath("oom_score_adj").read_text().strip()
    locked = evidence.meminfo(process.joinpath("status").read_text())["VmLck"]
    # IO_FLUSHER is PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE of the thread: include/linux/sched.h
    threads = {task.name: int((task / "stat").read_text().rpartition(")")[2].split()[6]) for task in (process / "task").iterdir()}
    flushers = sum(flag & 0x00180000 == 0x00180000 for flag in threads.values())
    wanted = ("io_flusher", "oom_score_adj_set", "memory_locked", "watermark_boost_off")
    reasons = [f"{key} is {stat.get(key)}" for key in wanted if stat.get(key) != "1"]
    if int(score) > -1000:
        reasons.append(f"oom_score_adj is {score}")
    if not locked:
        reasons.append("no memory is locked")
    if flushers < len(threads):
        reasons.append(f"only {flushers} of {len(threads)} threads are IO flushers")
    doctor = subprocess.run(unprotected([sys.executable, "-m", "tmemfs", "doctor"]), capture_output=True, text=True, timeout=120,
                            check=False)  # fmt: skip
    (guest.results / "doctor.txt").write_text(doctor.stdout + doctor.stderr)
    figures: dict[str, Figure] = {
        "oom_score_adj": int(score),
        "locked_mb": locked / 1e6,
        "threads": len(threads),
        "io_flusher_threads": flushers,
        "doctor_exit_code": doctor.returncode,
    }
    return guest.verdict("privileges", figures, reasons)


def quiet(guest: Guest) -> Verdict:
    """How often an idle daemon wakes: the quietest of several windows, for the machine looks at a new mount of its own accord."""
    pid, seconds, windows = guest.daemon_pid(), 5.0, list[float]()
    assert pid is not None, "only tmemfs has a daemon"
    time.sleep(5.0)
    for _ in range(12 if guest.full else 4):
        before = _wakes(pid)
        time.sleep(seconds)
        after = _wakes(pid)
        windows.append(sum(count - before.get(thread, 0) for thread, count in after.items()) / seconds)
    reasons = [] if min(windows) < MOST_WAKES_PER_S else [f"an idle daemon woke {min(windows):.1f} times a second"]
    figures: dict[str, Figure] = {"wakes_per_s_least": min(windows), "wakes_per_s_most": max(windows)}
    return guest.verdict("quiet", figures, reasons)


def _wakes(pid: int) -> dict[str, int]:
    """Voluntary context switches of each thread."""
    counts = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # a thread that ended meanwhile
            counts[task.name] = int(evidence.flat((task / "status").read_text())["voluntary_ctxt_switches:"])
    return counts


SCENARIOS: Final[dict[str, Callable[[Guest], Verdict]]] = {
    "privileges": privileges,
    "quiet": quiet,
    "low-memory": low_memory,
    "mlock-growth": mlock_growth,
    "nothing-but-swap": nothing_but_swap,
}
