"""`tmemfs upgrade` under load: undisturbed, and with the worker killed at a random moment of it."""

from __future__ import annotations

import time
from random import Random
from typing import Final

from tools.kills.targets import Target
from tools.kills.worker import Death, end
from tools.soak.places import HANG_S, Fault, ended

#: An upgrade takes about as long as the interpreter takes to start.
_LONGEST_PAUSE_S: Final = 1.5


def upgrade(target: Target) -> int:
    """Have the target upgrade to the code that it runs; returns when the command was started. Raises Fault."""
    began_ns = time.monotonic_ns()
    code, said = target.place.command("upgrade", str(target.place.mountpoint))
    if code:
        raise Fault(f"upgrade of {target.place.name} ended with {code}: {said}")
    return began_ns


def upgrade_and_kill(target: Target, random: Random) -> Death | None:
    """Kill the worker while an upgrade is under way; the upgrade may fail, but must answer. Raises Fault, NoWorker."""
    process = target.place.start("upgrade", str(target.place.mountpoint))
    try:
        time.sleep(random.uniform(0, _LONGEST_PAUSE_S))
        return end(target.supervisor, target.worker(), HANG_S)
    finally:
        code, _ = ended(process)
        target.counts[f"upgrade {'failed' if code else 'done'}"] += 1
