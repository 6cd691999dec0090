"""A program in a memory cgroup: started, measured and ended. Reports what the OOM killer did, and leaves nothing behind.

The CPU of a server is that of its process and of the children that it has waited for (a backend of PostgreSQL ends with its
client). The CPU of a program that ends by itself is that of the children that this process has waited for. Knows nothing of what
the programs do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Final, TypeVar

from tmemfs.units import MIB
from tools.bench.accounts import Meter, Usage, parse_flat
from tools.bench.contenders import Swap
from tools.bench.fresh_statistics import fresh_statistics
from tools.bench.workloads import Figures
from tools.cgroup import MemoryCgroup
from tools.interrupts import usual_signals

Result = TypeVar("Result")

#: The limits for a program, and for its end.
PROGRAM_S: Final = 120.0
_ENDED_S: Final = 20.0
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_SAID_CHARS: Final = 500


class ProgramFailed(Exception):
    """One or more of the programs gave no figures; the OOM killer ended `kills` processes."""

    def __init__(self, text: str, kills: int = 0) -> None:
        super().__init__(text)
        self.kills = kills


@contextmanager
def limited(limit_bytes: int, may_kill: bool = False) -> Iterator[MemoryCgroup]:
    """A cgroup with fresh statistics, emptied at the end.

    Raises ProgramFailed if the OOM killer killed there, unless it `may_kill`.
    """
    with MemoryCgroup("real", limit_bytes) as cgroup, fresh_statistics(cgroup.path):
        failure: Exception | None = None
        killed = 0
        try:
            yield cgroup
        except Exception as error:
            failure = error
        finally:
            # before the rest is killed: those kills are not the OOM killer's
            killed = oom_kills(cgroup)
            _end_all(cgroup)
        # a kill explains whatever else failed, so it is the error that is reported
        if killed and not may_kill:
            text = f"the OOM killer ended {killed} of its processes at {limit_bytes / MIB:.0f} MiB"
            raise ProgramFailed(text, killed) from failure
        if failure:
            raise failure


def each_limited(
    prefix: str, limits: Mapping[str, int], run: Callable[[str, MemoryCgroup], Figures]
) -> Iterator[tuple[str, Figures]]:
    """The figures of `run` of each program in a cgroup of its limit in bytes, and how many processes the OOM killer ended there.

    A program that fails does not end the others. Raises ProgramFailed at the end, with the reasons of those that failed.
    """
    failures = []
    for name, limit_bytes in limits.items():
        kills = 0
        try:
            with limited(limit_bytes) as cgroup:
                figures = run(name, cgroup)
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
            kills = error.kills if isinstance(error, ProgramFailed) else 0
        else:
            yield f"{prefix}-{name}", figures
        yield f"kills-{prefix}-{name}", {"oom_kills": kills}
    if failures:
        raise ProgramFailed("; ".join(failures))


def oom_kills(cgroup: MemoryCgroup) -> int:
    """How many processes the OOM killer has killed in `cgroup`."""
    for name in ("memory.oom_control", "memory.events"):
        if (cgroup.path / name).exists():
            return parse_flat((cgroup.path / name).read_text()).get("oom_kill", 0)
    return 0


def _end_all(cgroup: MemoryCgroup) -> None:
    """Kill what is left in `cgroup` until nothing is: a server may fork between the listing and the kill."""
    deadline = time.monotonic() + _ENDED_S
    while (tasks := cgroup.tasks.read_text().split()) and time.monotonic() < deadline:
        for task in tasks:
            with suppress(ProcessLookupError):
                os.kill(int(task), signal.SIGKILL)
        time.sleep(0.02)
    cgroup.reclaim()


def wait_gone(cgroup: MemoryCgroup, word: bytes) -> None:
    """Wait until no process in `cgroup` has `word` in its command line. Raises TimeoutError."""
    deadline = time.monotonic() + _ENDED_S
    while any(word in _command_line(task) for task in cgroup.tasks.read_text().split()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"a process with {word.decode()} in its command line does not end")
        time.sleep(0.01)


def _command_line(task: str) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{task}/cmdline").read_bytes()
    return b""


def within(cgroup: MemoryCgroup | None, *command: str) -> list[str]:
    """`command`, which enters `cgroup` first."""
    # by a shell, not by preexec_fn: so all memory of the program is charged to the cgroup, and none of this process
    return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(cgroup.tasks), *command] if cgroup else [*command]


@contextmanager
def started(command: Sequence[str], log: Path, end: signal.Signals = signal.SIGKILL) -> Iterator[subprocess.Popen[bytes]]:
    """A program that is ended by `end`, or if that does not help, by SIGKILL. Its output is in `log`."""
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True, preexec_fn=usual_signals
        )
    try:
        yield process
    finally:
        # a database that is killed would have to recover at its next start
        process.send_signal(end)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_ENDED_S)
        process.kill()
        process.wait()


def output(
    command: Sequence[str], stdin: IO[bytes] | None = None, env: dict[str, str] | None = None, with_errors: bool = False
) -> bytes:
    """The output of `command`, `with_errors` also of its standard error. Raises ProgramFailed."""
    done = subprocess.run(
        command,
        stdin=stdin or subprocess.DEVNULL,
        capture_output=True,
        timeout=PROGRAM_S,
        check=False,
        start_new_session=True,
        env=os.environ | (env or {}),
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-_SAID_CHARS:]
        raise ProgramFailed(f"{' '.join(command)}: exit code {done.returncode}: {said}")
    return done.stdout + (done.stderr if with_errors else b"")


def wait_until(ready: Callable[[], bool], server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until `server` serves. Raises ProgramFailed with the end of its log."""
    deadline = time.monotonic() + _ENDED_S
    while not ready():
        if server.poll() is not None or time.monotonic() > deadline:
            raise ProgramFailed(f"it did not start: {log.read_text(errors='replace').strip()[-_SAID_CHARS:]}")
        time.sleep(0.02)


def measured(swap: Swap, servers: tuple[int, ...], work: Callable[[], Result]) -> tuple[Result, Usage]:
    """What `work` returned and used; the CPU is that of `servers`, or without any, of the programs that `work` starts."""
    # the daemon may still write back what an earlier workload left
    swap.settle()
    meter = Meter(swap.daemons, servers, swap.disk, swap.counters)
    reaped_s, before = _reaped_s(servers), meter.now()
    result = work()
    # the time of the work alone, but the costs until the daemon is idle again
    wall_s = time.monotonic() - before.wall_s
    swap.settle()
    used = meter.now().since(before)
    return result, replace(used, wall_s=wall_s, process_s=used.process_s + _reaped_s(servers) - reaped_s)


def _reaped_s(servers: tuple[int, ...]) -> float:
    """CPU time of ended children: of `servers`, or of this process."""
    found = 0.0
    for pid in servers or (os.getpid(),):
        with suppress(OSError):
            found += parse_stat_reaped_s(Path(f"/proc/{pid}/stat").read_text())
    return found


def parse_stat_reaped_s(text: str, ticks: int = _TICKS) -> float:
    """User and system time of reaped children in /proc/PID/stat."""
    fields = text.rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / ticks


def costs(used: Usage, operations: float) -> Figures:
    """What was used per operation."""
    each = {
        "daemon_cpu_us": used.daemon_s * 1e6,
        "kworkers_cpu_us": used.kworkers_s * 1e6,
        "process_cpu_us": used.process_s * 1e6,
        "pages_in": used.pages_in,
        "pages_out": used.pages_out,
        "disk_bytes": used.disk.bytes,
    }
    totals = {
        "seconds": used.wall_s,
        "operations": operations,
        "pages_swapped_in": used.pages_in,
        "pages_swapped_out": used.pages_out,
        "disk_read_bytes": used.disk.read_bytes,
        "disk_written_bytes": used.disk.written_bytes,
    }
    return {**totals, **used.wear, **{name: value / max(operations, 1) for name, value in each.items()}}
