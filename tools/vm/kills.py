"""The worker of tmemfs killed in the guest: in a scenario of its own, and while another scenario runs.

A guest's kernel is 6.1, which cannot hand out again the requests that a dead worker had read. Every page is verified, and the
requests of a prober show how long page requests waited. Times are those of an emulated machine.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from statistics import median
from typing import Final

from tmemfs.system import runtime
from tmemfs.system.status_region import Word, read_status
from tmemfs.units import PAGE_BYTES
from tools.kills.deaths import Strike
from tools.kills.prober import Prober, Reads, Unanswered
from tools.kills.strikes import kill, kill_twice
from tools.kills.worker import NoWorker
from tools.vm import evidence
from tools.vm.contenders import SWAP_BYTES, Tmemfs
from tools.vm.environment import FILLED_S, VERIFIED_S, Guest, Hog, hogs_ended
from tools.vm.evidence import Figure, Verdict
from tools.vm.watch import Watch

#: Deaths: short, full.
DEATHS: Final = (12, 50)
#: Between two strikes.
PAUSE_S: Final = (0.2, 3.0)
#: Between two strikes while another scenario runs, whose progress is judged by intervals of 10 s.
SELDOM_S: Final = (6.0, 12.0)
#: Between two requests of the prober, which must not be what the emulated machine is busy with.
PROBED_S: Final = 0.02
#: The share of strikes that are two deaths, the second while the worker recovers.
TWICE_SHARE: Final = 0.25
IDLE_MIB: Final = 48
CYCLED_MIB: Final = 48
#: Left for the cyclers and everything else, less than the cyclers want; and for how long the rest is locked at most.
LEFT_BYTES: Final = 80 << 20
HELD_S: Final = 900
NEVER: Final = ("corrupt_records", "read_errors", "write_errors")


def kills(guest: Guest) -> Verdict:
    """Two programs have pages swapped out and verify them while workers die; a third one's pages rest until the end.

    A fourth one locks most of RAM, since the kernel keeps what it has swapped out in its swap cache as long as memory is free.
    """
    with hogs_ended() as running, Watch(guest.contender, guest.say) as watch:
        reasons = _start(running)
        before = swapped_in()
        with Killer(guest, PAUSE_S) as killer:
            killer.wait(DEATHS[guest.full])
        loaded = swapped_in() - before
        reasons += [*killer.reasons, *(reason for hog in running for reason in _wrong(hog))]
    watch.save(guest.results / "kills.samples")
    reasons += evidence.judge_log(guest.log())
    reasons += [] if loaded else ["no page was swapped in while workers died"]
    stat = guest.contender.stat()
    reasons += [f"{key} is {stat[key]}" for key in NEVER if stat.get(key, "0") != "0"]
    figures: dict[str, Figure] = {**killer.figures(), "pages_swapped_in_meanwhile": loaded}
    return guest.verdict("kills", figures, reasons)


def _start(running: list[Hog]) -> list[str]:
    """Start all four; returns what did not begin in time."""
    running.append(Hog("idle", "5", str(IDLE_MIB)))
    reasons = _begun(running[-1], "filled")
    available = evidence.meminfo(Path("/proc/meminfo").read_text())["MemAvailable"]
    running.append(Hog("mlock", str(max(available - LEFT_BYTES, LEFT_BYTES)), str(HELD_S)))
    reasons += _begun(running[-1], "seconds")
    cyclers = [Hog("cycle", str(CYCLED_MIB)) for _ in range(2)]
    running += cyclers
    # before a first round is verified nothing has been loaded
    return reasons + [reason for cycler in cyclers for reason in _begun(cycler, "verified")]


def _begun(hog: Hog, key: str) -> list[str]:
    return [] if hog.wait_for(key, FILLED_S) else [f"a hog did not say {key!r} within {FILLED_S:.0f} s"]


def swapped_in() -> int:
    """Pages swapped in since boot."""
    return evidence.numbers(Path("/proc/vmstat").read_text())["pswpin"]


def _wrong(hog: Hog) -> list[str]:
    """Have a hog verify its pages; what was wrong with them."""
    hog.tell()
    found = hog.wait_for("wrong", VERIFIED_S)
    if found is None:
        return [f"a hog did not verify its pages: exit code {hog.wait(0.5)}"]
    return [f"{found} pages were wrong"] if found != "0" else []


class Killer:
    """Kills workers at random moments from enter to exit, in a thread; `reasons` say what went wrong.

    `is_patient`: only while a spare worker is ready. Without free memory a next one cannot get ready while nobody serves.
    """

    def __init__(self, guest: Guest, pause_s: tuple[float, float], is_patient: bool = False) -> None:
        assert isinstance(guest.contender, Tmemfs), "only tmemfs has a worker"
        self._guest = guest
        self._image = guest.contender.mountpoint / "swap"
        self._supervisor = guest.daemon_pid()
        self._pause_s = pause_s
        self._is_patient = is_patient
        self._end = threading.Event()
        self._changed = threading.Condition()
        self._strikes: list[Strike] = []
        self.reasons: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(VERIFIED_S)
        if self._thread.is_alive():
            self.reasons.append("the last death was not followed by an answer")

    @property
    def deaths(self) -> int:
        """Workers killed so far."""
        return sum(strike.deaths for strike in self._strikes)

    def wait(self, deaths: int) -> None:
        """Wait until that many workers have died, or something went wrong."""
        with self._changed:
            self._changed.wait_for(lambda: self.deaths >= deaths or self.reasons)

    def figures(self, prefix: str = "") -> dict[str, Figure]:
        """What was counted and measured."""
        stalls = [strike.stall_s for strike in self._strikes]
        return {
            f"{prefix}kills": self.deaths,
            f"{prefix}kills_while_recovering": sum(strike.is_seen for strike in self._strikes),
            f"{prefix}stall_median_s": median(stalls) if stalls else 0.0,
            f"{prefix}stall_longest_s": max(stalls, default=0.0),
        }

    def _run(self) -> None:
        random = Random(11)
        with ExitStack() as stack:
            try:
                prober = stack.enter_context(_probed(self._image))
                while not self._end.wait(random.uniform(*self._pause_s)):
                    if not self._is_patient or self._has_spare():
                        self._strike(prober, random)
            except (NoWorker, Unanswered, OSError) as error:
                # before the image is closed, which may hang where nobody answers
                with self._changed:
                    self.reasons.append(f"after {self.deaths} kills: {error}")
                    self._changed.notify_all()

    def _has_spare(self) -> bool:
        status = read_status(runtime.status_path(self._image.parent))
        return status is not None and status.words[Word.SPARE_PID] != 0

    def _strike(self, prober: Prober, random: Random) -> None:
        assert self._supervisor is not None
        is_twice = random.random() < TWICE_SHARE and not self._is_patient
        strike = kill_twice(self._supervisor, prober, "", random) if is_twice else kill(self._supervisor, prober)
        self._guest.say(f"{strike.deaths} killed, stall {strike.stall_s:.2f} s")
        with self._changed:
            self._strikes.append(strike)
            self._changed.notify_all()


@contextmanager
def _probed(image: Path) -> Iterator[Prober]:
    """A prober that loads random pages of the image."""
    pages = Reads(image, range(SWAP_BYTES // PAGE_BYTES), seed=1)
    try:
        with Prober("swap", pages.request, PROBED_S) as prober:
            yield prober
    finally:
        pages.close()
