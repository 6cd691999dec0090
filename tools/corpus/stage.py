"""Where a program runs while its memory is captured: a directory, the started processes, and the end of all of them.

All processes that are started here, and their children, end with the stage in any case. This process adopts orphans
(PR_SET_CHILD_SUBREAPER), so it finds every process that is left, even one in a session of its own, or one that was being started
when a signal arrived. Processes are asked to end (SIGTERM), and killed if they have not after a while. SIGINT and SIGTERM are held
back during that. The directory is removed last.

Programs that refuse to run as root run as `nobody`, who owns the directory.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tmemfs.errors import Refused
from tools.corpus.pages import family
from tools.interrupts import usual_signals

START_S: Final = 120.0
_END_S: Final = 20.0
_POLL_S: Final = 0.05
_SUBREAPER: Final = 36
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Started:
    """A process, and the file of its output."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self.process.pid

    def said(self) -> str:
        """Its output so far."""
        return self.log.read_text(errors="replace")

    def wait_until(self, is_ready: Callable[[], bool], limit_s: float = START_S) -> None:
        """Wait until `is_ready`. Raises Refused if the process ends before that, or the time is over."""
        deadline = time.monotonic() + limit_s
        while not is_ready():
            if (code := self.process.poll()) is not None:
                raise Refused(f"{self.log.stem} ended with {code}: {last_line(self.said())}")
            if time.monotonic() > deadline:
                raise Refused(f"{self.log.stem} was not ready after {limit_s:.0f} s: {last_line(self.said())}")
            time.sleep(_POLL_S)

    def wait_for_word(self, word: str = "ready", times: int = 1) -> None:
        """Wait until it has printed `word` that many times. Raises Refused."""
        self.wait_until(lambda: self.said().count(word) >= times)


@dataclass(frozen=True, slots=True)
class Stage:
    """Starts programs in `directory`, all of them known to it by process id."""

    directory: Path
    started: dict[int, Started] = field(default_factory=dict)

    def start(self, name: str, command: Sequence[str | Path], as_nobody: bool = False) -> Started:
        """Start `command`, with its output in a log named `name`."""
        log = self.directory / f"{name}.log"
        user, group, others = _nobody() if as_nobody else (None, None, None)
        with log.open("wb") as said:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, cwd=self.directory,
                env=self._environment(), start_new_session=True, user=user, group=group, extra_groups=others,
                preexec_fn=usual_signals,
            )  # fmt: skip
        started = Started(process, log)
        self.started[process.pid] = started
        return started

    def run(self, name: str, command: Sequence[str | Path], as_nobody: bool = False) -> None:
        """Run `command` to its end, within the time limit of a start. Raises Refused if it fails."""
        started = self.start(name, command, as_nobody)
        try:
            code = started.process.wait(START_S)
        except subprocess.TimeoutExpired:
            raise Refused(f"{name} was not done after {START_S:.0f} s: {last_line(started.said())}") from None
        if code:
            raise Refused(f"{name} ended with {code}: {last_line(started.said())}")

    def write(self, name: str, text: str) -> Path:
        """Write a file that everybody may read."""
        file = self.directory / name
        file.write_text(text)
        file.chmod(0o644)
        return file

    def end(self) -> None:
        """End all processes below this one. Raises Refused for one that cannot be killed."""
        # a second SIGTERM makes some programs skip their cleanup
        told: set[int] = set()
        killed_from, given_up_at = time.monotonic() + _END_S, time.monotonic() + 2 * _END_S
        # orphans of ended children come to us one after the other, so until none is left
        while left := family(os.getpid())[1:]:
            if time.monotonic() > given_up_at:
                raise Refused(f"processes {left} cannot be killed: see what they wait for in /proc/PID/stack")
            for pid in left:
                self._end(pid, told, kill=time.monotonic() > killed_from)
            time.sleep(_POLL_S)

    def _end(self, pid: int, told: set[int], kill: bool) -> None:
        """Ask process `pid` to end, if it is a child; a child ends its own children, unless all are killed."""
        with suppress(ProcessLookupError, ChildProcessError):
            if kill:
                os.kill(pid, signal.SIGKILL)
            if not self._has_ended(pid) and pid not in told:
                told.add(pid)
                os.kill(pid, signal.SIGTERM)

    def _has_ended(self, pid: int) -> bool:
        """Whether a child has ended, which is then reaped. Raises ChildProcessError for a process that is no child."""
        if pid in self.started:
            return self.started[pid].process.poll() is not None
        return os.waitpid(pid, os.WNOHANG)[0] == pid

    def _environment(self) -> dict[str, str]:
        """Of our environment only the PATH: no proxies, no display, and a home below the stage."""
        place = str(self.directory)
        return {"PATH": os.environ.get("PATH", os.defpath), "HOME": place, "TMPDIR": place, "LANG": "C.UTF-8"}


@contextmanager
def stage() -> Iterator[Stage]:
    """A stage in a temporary directory; all its processes end with the block."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    one = Stage(Path(tempfile.mkdtemp(prefix="tmemfs-corpus-")))
    try:
        try:
            os.chown(one.directory, *_nobody()[:2])
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            yield one
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    # a block of its own: a signal may arrive just before those above are held back
    finally:
        _clear(one)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _clear(one: Stage) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        one.end()
    finally:
        shutil.rmtree(one.directory, ignore_errors=True)


def last_line(text: str) -> str:
    """The last line that is not empty: usually the error."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def _nobody() -> tuple[int, int, list[int]]:
    """User, group, and no other groups."""
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid, []
