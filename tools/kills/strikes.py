"""One strike: the worker killed, or the worker and the next one while it recovers; and how long page requests waited meanwhile."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Final

from tools.kills.deaths import STOPPED, Strike
from tools.kills.prober import Prober
from tools.kills.worker import Death, NoWorker, end, worker_of

#: Page requests have to be answered again within this time, and a new worker be there.
ANSWERED_S: Final = 60.0
#: A second death hits the first milliseconds of the next worker.
_SECOND_DEATH_S: Final = (0.0005, 0.05)


def kill(supervisor: int, prober: Prober, phase: str = "any moment", is_seen: bool = False) -> Strike:
    """Kill the worker once. Raises NoWorker, Unanswered."""
    return struck(prober, phase, is_seen, [_killed(supervisor, worker_of(supervisor, ANSWERED_S))])


def kill_twice(supervisor: int, prober: Prober, phase: str, random: Random) -> Strike:
    """Kill the worker, and the next one in its first milliseconds; the phase is seen if it had answered nothing by then.

    Raises NoWorker, Unanswered.
    """
    first = _killed(supervisor, worker_of(supervisor, ANSWERED_S))
    successor = worker_of(supervisor, ANSWERED_S, other_than=first.pid)
    time.sleep(random.uniform(*_SECOND_DEATH_S))
    is_seen = not prober.is_answered_since(first.ended_ns)
    return struck(prober, phase, is_seen, [first, _killed(supervisor, successor)])


def stop(supervisor: int, prober: Prober, limit_s: float, meanwhile: Callable[[], None]) -> Strike:
    """Stop the worker by SIGSTOP; its supervisor has to replace it within `limit_s`. Raises NoWorker, Unanswered."""
    worker = worker_of(supervisor, ANSWERED_S)
    death = end(supervisor, worker, limit_s, signal.SIGSTOP, meanwhile)
    return struck(prober, STOPPED, True, [_ours(death, worker)])


def struck(prober: Prober, phase: str, is_seen: bool, deaths: Sequence[Death]) -> Strike:
    """What the deaths cost, once page requests are answered again. Raises Unanswered."""
    stall_ns = prober.wait_for_stall(deaths[0].sent_ns, deaths[-1].ended_ns, ANSWERED_S)
    ending_ns = sum(death.ended_ns - death.sent_ns for death in deaths)
    return Strike(phase, len(deaths), is_seen, stall_ns / 1e9, ending_ns / 1e9)


def _killed(supervisor: int, worker: int) -> Death:
    return _ours(end(supervisor, worker, ANSWERED_S), worker)


def _ours(death: Death | None, worker: int) -> Death:
    if death is None:
        raise NoWorker(f"worker {worker} ended by itself, and not by our signal")
    return death
