"""`tmemfs upgrade` under load: undisturbed, and with the worker killed at a random moment of it."""

from __future__ import annotations

import time
from random import Random
from typing import Final

from tools.kills.deaths import Strike
from tools.kills.strikes import ANSWERED_S, kill
from tools.kills.targets import Target
from tools.soak.places import Fault, ended

#: An upgrade takes about as long as the interpreter takes to start.
_LONGEST_PAUSE_S: Final = 1.5


def upgrade(target: Target) -> Strike:
    """Have the target upgrade to the code that it runs. Raises Fault, Unanswered."""
    began_ns = time.monotonic_ns()
    code, said = target.place.command("upgrade", str(target.place.mountpoint))
    if code:
        raise Fault(f"upgrade of {target.place.name} ended with {code}: {said}")
    stall_ns = target.prober.wait_for_stall(began_ns, time.monotonic_ns(), ANSWERED_S)
    return Strike("upgraded", 0, True, stall_ns / 1e9)


def upgrade_and_kill(target: Target, random: Random) -> Strike:
    """Kill the worker while an upgrade is under way, which may fail, but must answer. Raises Fault, NoWorker, Unanswered."""
    process = target.place.start("upgrade", str(target.place.mountpoint))
    try:
        time.sleep(random.uniform(0, _LONGEST_PAUSE_S))
        strike = kill(target.supervisor, target.prober, "being upgraded", process.poll() is None)
    finally:
        code, _ = ended(process)
        target.counts[f"upgrade {'failed' if code else 'done'}"] += 1
    return strike
