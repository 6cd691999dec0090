"""Checks: what one finding of the doctor is, and the findings about the daemons that run. Asks no mount anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tmemfs.cli.health import Health, look
from tmemfs.errors import Refused
from tmemfs.system import runtime
from tmemfs.system.memory import OOM_SCORE_ADJ_MIN, oom_score_adj


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `ok` None means that tmemfs works without it, but less well."""

    name: str
    ok: bool | None
    found: str
    advice: str = ""


def daemons() -> list[Check]:
    """One for each mount that is recorded."""
    try:
        records = runtime.read_records()
    except (Refused, OSError):  # only root may read them, and an ordinary user is told so by other checks
        return []
    return [_daemon(record) for record in records]


def _daemon(record: runtime.MountRecord) -> Check:
    name, down = record.mountpoint, f"run 'tmemfs down {record.mountpoint}'"
    if not record.daemon_lives:
        return Check(name, False, f"its daemon (process {record.pid}) has ended", f"{down}, which cleans up")
    try:
        health = look(Path(record.mountpoint))
    except (Refused, OSError):
        health = None
    if health is None:
        return Check(name, None, f"its daemon (process {record.pid}) says nothing of its worker", "it is of another version")
    if health.has_given_up:
        return Check(name, False, health.why, f"end what is swapped out there, and {down}")
    if health.is_silent:
        return Check(name, None, health.why, "'tmemfs stat' shows what it held")
    return _protected(name, health)


def _protected(name: str, health: Health) -> Check:
    """That it serves, and what the OOM killer would do to it."""
    try:
        supervisor, worker = oom_score_adj(health.status.supervisor), oom_score_adj(health.status.worker)
    except OSError:  # it is being replaced just now
        return Check(name, None, health.why)
    if supervisor == worker == OOM_SCORE_ADJ_MIN:
        return Check(name, True, f"{health.serves}; the OOM killer spares both")
    first = "takes the worker first, which costs no page" if worker > supervisor else "may take either"
    return Check(name, None, f"{health.serves}; the OOM killer {first}", "protect both: run the daemon with CAP_SYS_RESOURCE")
