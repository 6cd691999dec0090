"""The scenario of locked memory that grows: idle processes fill the pool, then one program locks nearly all RAM.

While memory is locked, the command has to work, and afterwards every page has to be what it was.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from tools.vm import evidence
from tools.vm.contenders import Tmemfs, swap_counts, unprotected
from tools.vm.environment import FILLED_S, VERIFIED_S, Guest, Hog, hogs_ended
from tools.vm.evidence import Figure, Verdict
from tools.vm.watch import Watch

MIB: Final = 1 << 20
#: What the pool holds before the growth, as a share of what is available while it is empty.
POOL_SHARE: Final = 0.60
#: What the growth locks, as a share of RAM.
LOCKED_SHARE: Final = 0.80
#: Left available: for the grower's interpreter, page tables, the watermarks, and pages under writeback. With 20 MiB the grower was
#: killed when the pool was at its smallest, 8 MB, and 16 MB were under writeback to the swap.
MARGIN_BYTES: Final = 36 * MIB
IDLE_MIB: Final = 48
MOST_IDLE: Final = 20
#: The memory stays locked for at most this long while the command is tried.
HOLD_S: Final = 200.0
#: A program that takes longer is stuck, even in an emulated machine.
COLD_START_S: Final = 60.0
GROWN_S: Final = 240.0
#: Commands under full pressure, their allowed exit codes, and a word of the answer. A shrink may fall short, with a reason.
COLD_STARTS: Final = (
    (("shrink", "1M"), (0, 1), "reason"),
    (("set", "pool.max=50%"), (0,), ""),
    (("down",), (2,), "are swapped out"),
)


def mlock_growth(guest: Guest) -> Verdict:
    """Have idle processes fill the pool; then one program locks nearly all RAM, page by page."""
    available = evidence.meminfo(Path("/proc/meminfo").read_text())["MemAvailable"]
    size = lockable_bytes(guest.ram_bytes, available)
    with hogs_ended() as running, Watch(guest.contender, guest.say) as watch:
        reasons = _fill_pool(guest, running, available * POOL_SHARE)
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
        "available_percent": 100 * available / guest.ram_bytes,
        "idle_processes": len(running),
        "to_lock_percent": 100 * size / guest.ram_bytes,
        "oom_kills": swap_counts()[1],
        **_growth_figures(grower, watch, began, ended),
        **counted,
    }
    return guest.verdict("mlock-growth", figures, reasons)


def lockable_bytes(ram_bytes: int, available_bytes: int) -> int:
    """What the growth locks: LOCKED_SHARE of RAM, or what was available with an empty pool less a margin, if that is less.

    A guest this small has no more, even with an empty pool: kernel, daemon and observer take the rest.
    """
    return min(int(ram_bytes * LOCKED_SHARE), available_bytes - MARGIN_BYTES)


def _fill_pool(guest: Guest, running: list[Hog], wanted: float) -> list[str]:
    while guest.contender.pool_bytes() <= wanted:
        if len(running) == MOST_IDLE:
            return [f"{MOST_IDLE} idle processes did not fill the pool to {wanted / 1e6:.0f} MB"]
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
    """What is wrong with the command while memory is locked: a shrink has to answer, a limit be accepted, and `down` be refused."""
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
    """How fast it grew and the pool fell, and how long after the first sign of pressure the first frame was released."""
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
