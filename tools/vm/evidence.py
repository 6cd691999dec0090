"""What follows from the figures and the kernel log of a guest. Pure: text and samples in, findings and a verdict out.

Knows nothing of guests, processes and files. Times are seconds of a monotonic clock, sizes are bytes. Sources:
Documentation/admin-guide/sysctl/kernel.rst (hung_task_timeout_secs), mm/oom_kill.c and kernel/hung_task.c for the messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

_OOM: re.Pattern[str] = re.compile(r"(?:Out of memory|Memory cgroup out of memory|oom-kill|invoked oom-killer).*")
_KILLED: re.Pattern[str] = re.compile(r"[Oo]ut of memory.*: Killed process (\d+) \(([^)]*)\)")
_HUNG: re.Pattern[str] = re.compile(r"INFO: task (\S+):(\d+) blocked for more than (\d+) seconds")
_BROKEN: re.Pattern[str] = re.compile(
    r"(?:Read-error on swap-device|Write-error on swap-device|soft lockup|rcu: INFO: .*stall|I/O error, dev|kernel BUG|"
    r"BUG: unable|Kernel panic).*"
)
_BLOCKED: re.Pattern[str] = re.compile(r"sysrq: Show Blocked State\n(.*?)(?:sysrq: |\Z)", re.DOTALL)
_TASK: re.Pattern[str] = re.compile(r"\] task:(\S+) ")
_FRAME: re.Pattern[str] = re.compile(r"^\[[ \d.]+\]  ([\w.]+)\+0x", re.MULTILINE)
_ZONE: re.Pattern[str] = re.compile(r"Node \d+ (\w+) free:(\w+) boost:(\w+) min:(\w+)")
#: Frames shown of a blocked task, the innermost first; those of the scheduler are left out.
_FRAMES = 12
_OF_SCHEDULER = ("__schedule", "schedule", "schedule_timeout", "io_schedule", "io_schedule_timeout")

Figure = int | float | str | bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a scenario. `reasons` say what went wrong; `figures` are only reported."""

    scenario: str
    contender: str
    figures: dict[str, Figure] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing went wrong."""
        return not self.reasons


@dataclass(frozen=True, slots=True)
class Killed:
    """A process that the OOM killer killed."""

    pid: int
    name: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One figure at one time."""

    at: float
    value: float


def oom_kills(log: str) -> list[Killed]:
    """The processes that the OOM killer killed, by the kernel log."""
    return [Killed(int(pid), name) for pid, name in _KILLED.findall(log)]


def was_out_of_memory(log: str) -> bool:
    """Whether the OOM killer was invoked."""
    return _OOM.search(log) is not None


def hung_tasks(log: str) -> list[str]:
    """'NAME:PID for SECONDS s' per message of the hung task detector."""
    return [f"{name}:{pid} for {seconds} s" for name, pid, seconds in _HUNG.findall(log)]


def breakage(log: str) -> list[str]:
    """Other lines of the kernel log that must not be there: errors of the swap device, lockups, panics."""
    return [match[0] for match in _BROKEN.finditer(log)]


def where_it_hangs(console: str) -> list[str]:
    """What the kernel of a hung guest printed on request (machine.ask_where_it_hangs): free memory per zone, and blocked tasks.

    'NAME: FUNCTION < CALLER < ...' per name and place of waiting.
    """
    zones = _ZONE.findall(console)
    found = [f"zone {name}: free {free}, minimum {minimum} with a boost of {boost}" for name, free, boost, minimum in zones]
    blocked = _BLOCKED.search(console)
    _, *parts = _TASK.split(blocked[1] if blocked else "")
    for name, trace in zip(parts[::2], parts[1::2], strict=True):
        frames = [frame for frame in _FRAME.findall(trace) if frame not in _OF_SCHEDULER]
        found.append(f"{name}: {' < '.join(frames[:_FRAMES])}")
    return list(dict.fromkeys(found))


def judge_log(log: str, daemon_pid: int | None = None, kills_allowed: bool = False) -> list[str]:
    """What is wrong according to the kernel log. With `kills_allowed` only a kill of `daemon_pid` counts."""
    kills = [kill for kill in oom_kills(log) if not kills_allowed or kill.pid == daemon_pid]
    reasons = [f"the OOM killer ended {kill.name} ({kill.pid})" for kill in kills]
    if was_out_of_memory(log) and not oom_kills(log) and not kills_allowed:
        reasons.append("the OOM killer was called")
    reasons += [f"hung task: {task}" for task in hung_tasks(log)]
    return reasons + [f"kernel log: {line}" for line in breakage(log)[:5]]


def longest_gap(samples: Sequence[Sample]) -> float:
    """The longest time, in seconds, in which the counter of `samples` did not move; what precedes the first sample is not known."""
    longest, since = 0.0, samples[0].at if samples else 0.0
    for before, sample in pairwise(samples):
        longest = max(longest, sample.at - since)
        if sample.value != before.value:
            since = sample.at
    return longest


def intervals_without_progress(samples: Sequence[Sample], seconds: float) -> list[float]:
    """Starts (counted from the first sample) of the whole intervals of `seconds` in which the counter of `samples` did not move."""
    if not samples:
        return []
    began, moved = samples[0].at, set[int]()
    for before, sample in pairwise(samples):
        if sample.value != before.value:
            moved.add(int((sample.at - began) // seconds))
    whole = int((samples[-1].at - began) // seconds)
    return [number * seconds for number in range(whole) if number not in moved]


def between(samples: Iterable[Sample], start: float, end: float) -> list[Sample]:
    """The samples of [start, end]."""
    return [sample for sample in samples if start <= sample.at <= end]


def fastest_fall(samples: Sequence[Sample]) -> float:
    """The fastest fall from one sample to the next, per second; 0 if the value never fell."""
    return max(
        ((before.value - sample.value) / (sample.at - before.at) for before, sample in pairwise(samples) if sample.at > before.at),
        default=0.0,
    )


def steady_fall(samples: Sequence[Sample]) -> float:
    """The fall from the highest value to the lowest one after it, per second; 0 if the value never fell."""
    if not samples:
        return 0.0
    top = max(samples, key=lambda sample: sample.value)
    low = min((sample for sample in samples if sample.at >= top.at), key=lambda sample: sample.value)
    return (top.value - low.value) / (low.at - top.at) if low.at > top.at else 0.0


def first_growth(samples: Sequence[Sample]) -> float | None:
    """When the value was first above that of the first sample."""
    return next((sample.at for sample in samples if sample.value > samples[0].value), None)


def first_fall(samples: Sequence[Sample], step: float) -> float | None:
    """When the value was first at least `step` below the highest one before."""
    top = -1.0
    for sample in samples:
        if sample.value <= top - step:
            return sample.at
        top = max(top, sample.value)
    return None


def flat(text: str) -> dict[str, str]:
    """A flat keyed file ('key value' a line)."""
    return {fields[0]: fields[1] for line in text.splitlines() if len(fields := line.split(maxsplit=1)) == 2}


def numbers(text: str) -> dict[str, int]:
    """The whole numbers of a flat keyed file, such as /proc/vmstat."""
    return {key: int(value) for key, value in flat(text).items() if value.strip().isdigit()}


def meminfo(text: str) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): int(row[1]) << 10 for row in rows if len(row) == 3 and row[2] == "kB"}


def minimum_watermark_pages(zoneinfo: str) -> int:
    """The minimum watermarks of all zones, in pages."""
    return sum(int(found) for found in re.findall(r"^ +min +(\d+)$", zoneinfo, re.MULTILINE))
