"""The handover: how a supervisor is replaced by one of another version, while its swap is in use.

    asker                supervisor                          candidate: the other version, executed by the supervisor
    `tmemfs upgrade` --> forks and executes the candidate
                         goes on, also with its worker       imports, adopts the holdings, says ADOPTS
                         has its worker leave
                         says GO, and waits                  forks a worker, watches it serve for TRIAL_S
                         ends                            <-- says SERVES
                    <----------------------------------------is the supervisor from here on, and answers the asker

A candidate that says what it lacks, ends, takes longer than START_S or HANDOVER_S, or whose worker dies before SERVES, changes
nothing: it is killed, and the old supervisor forks a worker again, or goes on with the one that it has. What happens between the
last request of the old worker and the first of the new one reads no file: the candidate has imported everything before, and is
locked in RAM.

This is the supervisor's side; the other one is candidate.py. `asked` is what the command sends: a line of JSON.

Invariants:
1. At most one worker lives: GO is said after the supervisor's own worker has ended, and a failed candidate is waited for with all
   its children, a process group that the kernel gives to the supervisor (memory.adopt_orphans), before another worker serves.
2. A candidate ends with the supervisor until GO; from there on it goes on without, for there is no other worker.
3. The supervisor ends without undoing anything: mount, backing, status and settings are the candidate's.

Source: unix(7), prctl(2) PR_SET_CHILD_SUBREAPER, sd_notify(3) MAINPID.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tmemfs.manifest import Manifest
from tmemfs.system import memory
from tmemfs.system.notify import notify

ADOPTS: Final = b"adopts"
GO: Final = b"go"
SERVES: Final = b"serves"
#: For the candidate to import and adopt everything, on a machine that is short of memory.
START_S: Final = 120.0
#: From GO to SERVES.
HANDOVER_S: Final = 30.0
#: The old worker is killed if it has not left by then.
LEAVE_S: Final = 2.0
_KILLED_S: Final = 1.0
_LONGEST_MESSAGE: Final = 16 << 10
_EXECUTION_FAILED: Final = 127

#: Makes the manifest with these descriptors, beside those of the holdings.
MakeManifest = Callable[[Mapping[str, int]], Manifest]


def listen(path: Path) -> socket.socket:
    """A socket at `path` for the command, which only root may connect to. Raises OSError."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(listener.fileno(), 0o600)  # before it has a name
        listener.bind(os.fspath(path))
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    return listener


def answer(asker: socket.socket, is_done: bool, text: str) -> None:
    """Tell the command what came of it. One that has ended is no error."""
    with suppress(OSError), asker:
        asker.send(json.dumps({"done": is_done, "text": text}).encode())


class Handover:
    """Requests to hand over that arrive at `listener`, one at a time. `fd` is readable when `step` has something to do."""

    def __init__(self, listener: socket.socket, make_manifest: MakeManifest, news: str = "") -> None:
        # constant after construction
        self._listener = listener
        self._make_manifest = make_manifest
        self._events = select.epoll()
        self._events.register(listener, select.EPOLLIN)
        self.fd = self._events.fileno()
        # what is under way
        self._asker: socket.socket | None = None
        self._candidate: Candidate | None = None
        # what came of the last one, for the log
        self._news = news

    @property
    def is_under_way(self) -> bool:
        """Whether there is a candidate."""
        return self._candidate is not None

    @property
    def is_ready(self) -> bool:
        """Whether a candidate has adopted everything, and waits for the worker to leave."""
        return self._candidate is not None and self._candidate.has_adopted

    def step(self) -> None:
        """Do what there is to do, without waiting."""
        for fd, _ in self._events.poll(0):
            if fd == self._listener.fileno():
                self._accept()
            elif self._asker is not None and fd == self._asker.fileno():
                self._hear(self._asker)
        if self._candidate is not None and (why := self._candidate.failure()):
            self._fail(why)

    def complete(self) -> int:
        """No worker lives: let the candidate go on. Its process, for which this one has to end (invariant 3); 0 if it failed."""
        candidate, asker = self._candidate, self._asker
        assert candidate is not None and asker is not None
        if why := candidate.go():
            self._fail(why)
            _wait_for(candidate.pid)  # and for its worker, which reads requests until it has ended
            return 0
        notify(f"MAINPID={candidate.pid}")
        return candidate.pid

    def take_news(self) -> str:
        """What came of the last handover, the first time that it is asked for."""
        news, self._news = self._news, ""
        return news

    def abort(self, why: str) -> None:
        """End what is under way."""
        if self._candidate is not None or self._asker is not None:
            self._fail(why)

    def close(self) -> None:
        """Listen no more, and end what is under way."""
        self.abort("the file system was unmounted")
        self._listener.close()
        self._events.close()

    def _accept(self) -> None:
        """Take a request, or refuse it at once while there is another."""
        with suppress(OSError):
            asker, _ = self._listener.accept()
            if self._asker is not None:
                answer(asker, False, "another upgrade is under way: wait for it")
                return
            asker.setblocking(False)
            self._asker = asker
            self._events.register(asker, select.EPOLLIN)

    def _hear(self, asker: socket.socket) -> None:
        """The command says what to execute, or has ended."""
        try:
            asked = asker.recv(_LONGEST_MESSAGE)
        except OSError:
            asked = b""
        if not asked or self._candidate is not None:
            return self._fail("the command has ended")
        try:
            self._candidate = Candidate.execute(Request.decode(asked), asker, self._listener, self._make_manifest)
        except (OSError, ValueError) as error:
            return self._fail(f"it could not be executed ({error})")
        self._events.register(self._candidate.pidfd, select.EPOLLIN)
        self._events.register(self._candidate.channel, select.EPOLLIN)

    def _fail(self, why: str) -> None:
        """Undo what is under way, and say why."""
        candidate, self._candidate = self._candidate, None
        asker, self._asker = self._asker, None
        if candidate is not None:
            # A worker that was forked meanwhile has them too, so that to close them does not unregister them.
            self._events.unregister(candidate.pidfd)
            self._events.unregister(candidate.channel)
            candidate.end()
            if candidate.has_adopted:  # the next worker logs it; before that there is none
                self._news = f"the upgrade failed: {why}"
        if asker is not None:
            self._events.unregister(asker)
            answer(asker, False, why)


@dataclass(frozen=True, slots=True)
class Request:
    """What to execute as the candidate: `command`, to which the descriptor of the manifest is added, with `path` as PYTHONPATH."""

    command: tuple[str, ...]
    path: str

    def encode(self) -> bytes:
        """As JSON."""
        return json.dumps({"command": self.command, "path": self.path}).encode()

    @classmethod
    def decode(cls, text: bytes) -> Request:
        """Raises ValueError for what `encode` of no version returns."""
        try:
            found = json.loads(text)
            return cls(tuple(map(str, found["command"])), str(found["path"]))
        except (KeyError, TypeError) as error:
            raise ValueError("not a request") from error


@dataclass(slots=True)
class Candidate:
    """A candidate that was executed: its process, the channel to it, and what it prints."""

    pid: int
    pidfd: int
    channel: socket.socket
    printed: int
    has_adopted: bool = False
    _deadline: float = field(default_factory=lambda: time.monotonic() + START_S)

    @classmethod
    def execute(cls, request: Request, asker: socket.socket, listener: socket.socket, make_manifest: MakeManifest) -> Candidate:
        """Fork and execute it. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        printed = os.memfd_create("tmemfs-candidate", os.MFD_CLOEXEC)
        with theirs:
            fds = {"channel": theirs.fileno(), "asker": asker.fileno(), "listener": listener.fileno()}
            memory.adopt_orphans()
            supervisor, pid = os.getpid(), os.fork()
            if not pid:
                _become(request, printed, supervisor, make_manifest, fds)
        with suppress(OSError):
            os.setpgid(pid, pid)  # whichever of the two is first
        ours.setblocking(False)
        return cls(pid, os.pidfd_open(pid), ours, printed)

    def failure(self) -> str:
        """Why it will not take over; nothing if it still may, or can."""
        said = self._said()
        if said == ADOPTS:
            self.has_adopted = True
        elif said:
            return os.fsdecode(said)
        if _is_readable(0, self.pidfd):
            return f"the new version has ended{self._last_line()}"
        if not self.has_adopted and time.monotonic() > self._deadline:
            return f"the new version was not ready after {START_S:.0f} s{self._last_line()}"
        return ""

    def go(self) -> str:
        """Let it serve, and wait until it does; why it does not, or nothing."""
        with suppress(OSError):
            self.channel.send(GO)
        _is_readable(HANDOVER_S, self.channel.fileno(), self.pidfd)
        said = self._said()
        # The channel of a process that ends is closed a moment before that can be seen.
        has_ended = _is_readable(0 if said else _KILLED_S, self.pidfd)
        if said == SERVES and not has_ended:
            return ""
        if said not in (b"", SERVES):
            return os.fsdecode(said)
        return "the new version has ended" if has_ended else f"the new version did not serve within {HANDOVER_S:.0f} s"

    def end(self) -> None:
        """Kill it. What waits for a disk may need longer to end: without GO it does no harm, and nothing waits for it here."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        _is_readable(_KILLED_S, self.pidfd)
        _wait_for(self.pid, os.WNOHANG)
        self.channel.close()
        os.close(self.pidfd)
        os.close(self.printed)

    def _said(self) -> bytes:
        with suppress(OSError):
            return self.channel.recv(_LONGEST_MESSAGE)
        return b""

    def _last_line(self) -> str:
        """The last line that it printed: of an error that it did not expect."""
        lines = os.pread(self.printed, os.fstat(self.printed).st_size, 0).decode(errors="replace").split("\n")
        return next((f": {line}" for line in reversed(lines) if line.strip()), "")


def _become(request: Request, printed: int, supervisor: int, make_manifest: MakeManifest, fds: dict[str, int]) -> None:
    """In the forked process: execute the candidate; never returns."""
    try:
        os.setpgid(0, 0)
        memory.end_with_parent(supervisor)
        memory.ordinary_thread()  # what it does now is not urgent; the page path is
        fds |= {"stdout": os.dup(1), "stderr": os.dup(2)}
        for standard in (1, 2):
            os.dup2(printed, standard)
        manifest = make_manifest(fds)
        memfd = os.memfd_create("tmemfs-manifest")
        os.write(memfd, manifest.encode())
        for fd in (memfd, *manifest.fds.values()):
            os.set_inheritable(fd, True)
        words = [*request.command, str(memfd), os.fspath(manifest.options.mountpoint)]
        os.execve(request.command[0], words, {**os.environ, "PYTHONPATH": request.path})
    except BaseException as error:
        with suppress(OSError):
            os.write(2, f"{error}\n".encode(errors="surrogateescape"))
    os._exit(_EXECUTION_FAILED)


def _wait_for(group: int, options: int = 0) -> None:
    """Wait for the end of all children of a process group: of a candidate and what it has forked, not of a spare of our own."""
    with suppress(ChildProcessError):
        while os.waitpid(-group, options)[0]:
            pass


def _is_readable(seconds: float, *fds: int) -> bool:
    """Whether one of `fds` is readable within `seconds`."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
