"""A machine of files: kernel settings, workers of the kernel and their scheduling, and users that may be killed at any call."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkstemp
from typing import Any
from unittest.mock import patch

from tmemfs.system import kernel_settings, kworkers, sysctl
from tmemfs.system.kernel_settings import BOOST, MINIMUM, KernelSettings

ORDINARY = (os.SCHED_OTHER, 0)
PRIORITY = (os.SCHED_RR, 1)


class Killed(BaseException):
    """The process ends here: nothing that follows takes effect."""


@dataclass
class Machine:
    """Files below `root` instead of /proc and /run; `scheduling` of the kernel's threads by process id."""

    root: Path
    scheduling: dict[int, tuple[int, int]] = field(default_factory=dict)
    calls_left: int | None = None
    users: list[KernelSettings] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("proc/sys/vm", "proc/sys/kernel/random", "proc/2/task/2"):
            (self.root / name).mkdir(parents=True)
        self.set(MINIMUM, 67584)
        self.set(BOOST, 15000)
        self.boot("first")
        self.threads({})

    @property
    def directory(self) -> Path:
        """Of the record."""
        return self.root / "run"

    def set(self, name: str, value: int) -> None:
        """As the administrator does."""
        (self.root / "proc/sys/vm" / name).write_text(f"{value}\n")

    def now(self, name: str) -> int:
        """The value now."""
        return int((self.root / "proc/sys/vm" / name).read_text().split()[0])

    def boot(self, identity: str) -> None:
        """Start the machine again; files stay."""
        (self.root / "proc/sys/kernel/random/boot_id").write_text(f"{identity}\n")

    def threads(self, names: dict[int, str]) -> None:
        """The kernel's threads, with ordinary scheduling those that are new."""
        proc = self.root / "proc"
        (proc / "2/task/2/children").write_text("".join(f"{pid} " for pid in names))
        for pid, name in names.items():
            (proc / str(pid)).mkdir(exist_ok=True)
            (proc / str(pid) / "comm").write_text(f"{name}\n")
            self.scheduling.setdefault(pid, ORDINARY)

    def user(self) -> KernelSettings:
        """A process that may change settings."""
        self.users.append(KernelSettings(self.directory, self.root / "proc"))
        return self.users[-1]

    def kill(self, user: KernelSettings) -> None:
        """As SIGKILL: its descriptors are closed, and with them its lock is free."""
        if user._user is not None:
            os.close(user._user[0])
            user._user = None
        user.close()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Calls that change something count, and raise Killed once `calls_left` of them were made; so do all that follow."""
        faulty = _Faulty(self)
        modules: tuple[Any, ...] = (kernel_settings, kworkers, sysctl)
        patches = [patch.object(module, "os", faulty.over(os)) for module in modules]
        patches += [
            patch.object(kernel_settings, "mkstemp", faulty.call(mkstemp)),
            patch.object(kernel_settings, "fcntl", faulty.over(fcntl)),
        ]
        for each in patches:
            each.start()
        try:
            yield
        finally:
            for each in patches:
                each.stop()
            for user in self.users:
                self.kill(user)
            self.calls_left = None


class _Faulty:
    """Gives modules whose functions may raise Killed, and scheduling from `machine`."""

    _COUNTED = ("open", "write", "pwrite", "rename", "unlink", "flock", "sched_setscheduler")

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def over(self, module: Any) -> Any:
        """`module` with counted functions."""
        found = type("Faulty", (), {name: getattr(module, name) for name in dir(module) if not name.startswith("__")})
        ours: dict[str, Callable[..., Any]] = {
            "sched_setscheduler": self._set,
            "sched_getscheduler": self._policy,
            "sched_getparam": self._parameters,
        }
        for name, function in ours.items():
            setattr(found, name, staticmethod(function))
        for name in self._COUNTED:
            if hasattr(found, name):
                setattr(found, name, staticmethod(self.call(getattr(found, name))))
        return found

    def call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, unless the process is killed before."""

        def called(*arguments: Any, **named: Any) -> Any:
            if self._machine.calls_left is not None:
                if not self._machine.calls_left:
                    raise Killed
                self._machine.calls_left -= 1
            return function(*arguments, **named)

        return called

    def _set(self, pid: int, policy: int, parameters: os.sched_param) -> None:
        if pid not in self._machine.scheduling:
            raise ProcessLookupError
        self._machine.scheduling[pid] = (policy, parameters.sched_priority)

    def _policy(self, pid: int) -> int:
        return self._machine.scheduling[pid][0]

    def _parameters(self, pid: int) -> os.sched_param:
        return os.sched_param(self._machine.scheduling[pid][1])
