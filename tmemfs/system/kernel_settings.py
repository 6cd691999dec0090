"""Settings of the machine that daemons change while their swap is on, and how they are restored.

This is the only module that changes settings of the machine. It does not decide when: jobs/kernel_tuning.py does.

    vm.watermark_boost_factor    0 while a user is registered: otherwise the kernel raises its minimum watermark by megabytes when
                                 memory is fragmented, and no program may use the memory below it
    vm.min_free_kbytes           three quarters or half of the administrator's value, for moments, in a swap stall
    unbound workers              the lowest real-time priority while memory is short (kworkers.py)

The first user records the administrator's values in the runtime directory before the first change. Each user holds a lock on a
file of its own there, so a user that was killed is noticed: its lock is free. The last user that ends, the next start of a daemon
and `tmemfs down` restore what is recorded. Two users may lower and restore at the same time without coordination: each makes the
change that it needs again at its next check.

Invariants:
 1. A lowered value is computed from the recorded one, never from the current one. So it never falls below half of it.
 2. While a user lives, or something could not be restored, the record stays: a current value is never recorded over it.
 3. A current value that is neither the recorded one nor one that is written here was set by the administrator: it stays.

Thread-safety: `lower_minimum`, `restore_minimum`, `give_priority` and `take_priority` from one thread, and not during `register`
and `release`. They take no lock and open no files but those of the kernel's threads. Sources:
Documentation/admin-guide/sysctl/vm.rst (min_free_kbytes, watermark_boost_factor), mm/page_alloc.c (boost_watermark), flock(2).
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkstemp
from typing import Final

from tmemfs.errors import Busy
from tmemfs.system import runtime
from tmemfs.system.kworkers import KernelWorkers
from tmemfs.system.sysctl import Sysctl

log = logging.getLogger(__name__)

MINIMUM: Final = "min_free_kbytes"
BOOST: Final = "watermark_boost_factor"
#: Every value that is ever written, as a share of the administrator's.
SHARES: Final[dict[str, tuple[float, ...]]] = {MINIMUM: (3 / 4, 1 / 2), BOOST: (0.0,)}
#: Names of files in the runtime directory.
_RECORD: Final = "kernel-settings"
#: No file of a mount has such a name: runtime.name_for returns no plus sign.
_LOCK: Final = "kernel-settings+lock"
_USER: Final = "kernel-settings+user+"
_NEW: Final = "kernel-settings+new+"
#: Of a user that outlives its process, while it is none; and while its file is not locked yet.
_HELD: Final = "kernel-settings+held+"
_MAKING: Final = "kernel-settings+making+"
#: The holder of the lock reads and writes a few small files. Only a process that is stopped holds it longer.
_LOCK_S: Final = 5.0
_POLL_S: Final = 0.01


def lowered(administrators: int, share: float) -> int:
    """`share` of the administrator's value, rounded up, so that it is never less than half."""
    return math.ceil(administrators * share)


def _is_ours(name: str, administrators: int, value: int) -> bool:
    """Whether `value` may have been written here."""
    return value in [lowered(administrators, share) for share in SHARES[name]]


@dataclass(frozen=True, slots=True)
class SettingsRecord:
    """The administrator's values by name, for the boot with the id `boot`; `workers` had our priority before we gave it."""

    boot: str
    values: dict[str, int] = field(default_factory=dict)
    workers: frozenset[int] = frozenset()

    def encode(self) -> bytes:
        """As JSON."""
        fields = {"boot": self.boot, "values": self.values, "workers": sorted(self.workers)}
        return json.dumps(fields).encode() + b"\n"

    @classmethod
    def decode(cls, text: bytes) -> SettingsRecord:
        """The record in `text`. Raises ValueError for what `encode` does not return."""
        try:
            fields = json.loads(text)
            values = {name: int(fields["values"][name]) for name in SHARES if name in fields["values"]}
            return cls(str(fields["boot"]), values, frozenset(map(int, fields["workers"])))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("not a record of kernel settings") from error


#: The record of a user that found none although another user lives: it changes nothing.
_UNKNOWN: Final = SettingsRecord("")


@dataclass(frozen=True, slots=True)
class Change:
    """A setting, its value now, and the administrator's."""

    name: str
    now: int
    administrators: int


@dataclass(frozen=True, slots=True)
class Findings:
    """What is changed now, how many of the kernel's `workers` have our priority, and whether a user lives."""

    changed: tuple[Change, ...] = ()
    workers: int = 0
    is_in_use: bool = False


def held_user(directory: Path | None = None) -> int | None:
    """A descriptor for a user that outlives its process: a locked file, which forked processes share. None where that is refused.

    It counts as a user while its name says so: from `register` to `release`, of whichever process.
    """
    place = directory or runtime.DIRECTORY
    try:
        fd, name = mkstemp(prefix=_MAKING, dir=place)
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.rename(name, name.replace(_MAKING, _HELD))
    except OSError:
        return None
    return fd


class KernelSettings:
    """One user of the machine's settings; not registered at first. With `held`, `resume` goes on where an earlier process ended."""

    def __init__(self, directory: Path | None = None, proc: Path = Path("/proc"), held: int | None = None) -> None:
        self._directory = directory or runtime.DIRECTORY
        self._proc = proc
        self._sysctls = {name: Sysctl(proc / "sys/vm" / name) for name in SHARES}
        self._workers = KernelWorkers(proc)
        self._record = _UNKNOWN
        self._user: tuple[int, str] | None = None
        self._is_lowered = False
        self._held = held

    @property
    def is_registered(self) -> bool:
        """Whether this user may change settings."""
        return self._user is not None

    @property
    def raised_workers(self) -> int:
        """Workers of the kernel that were seen to have our priority."""
        return self._workers.raised

    def changes(self) -> tuple[Change, ...]:
        """Every recorded setting of a registered user, changed or not."""
        recorded = self._record.values if self.is_registered else {}
        now = [(name, administrators, self._sysctls[name].read()) for name, administrators in recorded.items()]
        return tuple(
            Change(name, value, administrators if _is_ours(name, administrators, value) else value)
            for name, administrators, value in now
            if value is not None
        )

    def resume(self) -> None:
        """Be registered if an earlier process with the same held user was. Raises OSError.

        It reads a file, which may have to be swapped in: not before the swap is served.
        """
        if self._held is not None and (user := self._name_of(self._held, _USER)):
            # Who registered with it died, and the record is still the one that it found.
            self._user = (self._held, user)
            self._record = self._load() or _UNKNOWN

    def register(self) -> None:
        """Record the administrator's values if nobody has, and turn boosting off. Raises Busy, Refused, OSError."""
        if self.is_registered:
            return
        runtime.runtime_directory(self._directory)
        with self._lock():
            # before our own file is there: it would count as another living user, and nothing would be recorded
            record = self._recorded()
            self._user = self._new_user()
            self._record = record
            self._set(BOOST, 0.0)

    def release(self) -> None:
        """Undo what was changed here; the last user restores everything. Raises nothing: what fails is logged."""
        if self._user is None:
            return
        # what this user lowered, even if another one lives and the rest has to stay changed
        self.restore_minimum()
        self.take_priority()
        (user, file), self._user = self._user, None
        try:
            with self._lock():
                # before the users are counted: this one no longer needs anything
                self._unname(user, file)
                self._restore_all(self._load() or self._record)
        except FileNotFoundError:
            # somebody removed the directory or its files; the values are still known here
            self._restore_all(self._record)
        except (Busy, OSError) as error:
            log.warning("kernel settings may stay changed (%s): run 'tmemfs down' again", error)
        finally:
            if user != self._held:
                os.close(user)

    def restore_leftovers(self) -> None:
        """Restore what killed users left changed; living users change again what they need. Raises Busy, OSError."""
        if not self._directory.is_dir():
            return
        with self._lock():
            if record := self._load():
                self._restore_all(record)
            # a record of another boot, or one that cannot be read, describes nothing
            elif not self._living():
                self._forget()

    def lower_minimum(self, share: float) -> bool:
        """Lower vm.min_free_kbytes to a share of the administrator's value; whether it is that low, or lower for another user."""
        done = self.is_registered and self._set(MINIMUM, share)
        self._is_lowered |= done
        return done

    def restore_minimum(self) -> None:
        """Restore vm.min_free_kbytes; a failure is tried again at the next call."""
        if self._is_lowered and self._restore(MINIMUM, self._record):
            self._is_lowered = False

    def give_priority(self) -> None:
        """Give our priority to those of the kernel's unbound workers that have an ordinary one."""
        if self.is_registered and self._record != _UNKNOWN:
            self._workers.give_priority(self._record.workers)

    def take_priority(self) -> None:
        """Give the kernel's unbound workers their ordinary priority back."""
        if self.is_registered and self._record != _UNKNOWN:
            self._workers.take_priority(self._record.workers)

    def drop_held(self) -> None:
        """Nobody will use the held user any more: remove its file. After `release`."""
        if self._held is not None and (file := self._name_of(self._held, _HELD)):
            with suppress(OSError):
                os.unlink(file)

    def close(self) -> None:
        """Release the descriptors. After `release`."""
        for sysctl in self._sysctls.values():
            sysctl.close()

    def findings(self) -> Findings:
        """What is changed now; changes nothing. Raises OSError, PermissionError where the record may not be read."""
        record = self._load()
        if record is None:
            return Findings()
        now = {name: _read(self._proc / "sys/vm" / name) for name in record.values}
        changed = [
            Change(name, value, record.values[name])
            for name, value in now.items()
            if value not in (None, record.values[name]) and _is_ours(name, record.values[name], value)
        ]
        raised = self._workers.with_priority() - record.workers
        return Findings(tuple(changed), len(raised), any(not is_free for _, is_free in self._users()))

    def _set(self, name: str, share: float) -> bool:
        """Lower `name`, unless the administrator has set it since. Whether it is as low as asked."""
        administrators, now = self._record.values.get(name), self._sysctls[name].read()
        if administrators is None or now is None:
            return False
        wanted = lowered(administrators, share)
        # invariant 3
        if now != administrators and not _is_ours(name, administrators, now):
            return False
        # another user may need a lower value: never raise what it wrote
        return now <= wanted or self._sysctls[name].write(wanted)

    def _restore(self, name: str, record: SettingsRecord) -> bool:
        """Undo a change of `name`. Whether nothing of ours is left of it."""
        administrators, now = record.values[name], self._sysctls[name].read()
        if now is None:
            return False
        return now == administrators or not _is_ours(name, administrators, now) or self._sysctls[name].write(administrators)

    def _restore_all(self, record: SettingsRecord) -> bool:
        """Restore everything, or, while a user lives, only what it changes again by itself. Whether the record is gone."""
        is_in_use = self._living()
        if record == _UNKNOWN:
            return False
        # users turn boosting off once, at `register`; the rest they set again while they need it
        names = [name for name in record.values if name != BOOST or not is_in_use]
        done = [self._restore(name, record) for name in names] + [self._workers.take_priority(record.workers)]
        # invariant 2
        if is_in_use or not all(done):
            return False
        self._forget()
        return True

    def _recorded(self) -> SettingsRecord:
        """The administrator's values: the recorded ones, or the current ones if nobody can have changed them."""
        record, is_in_use = self._load(), self._living()
        # without a living user, restore first: the administrator may have set new values since the record was written
        if record and (is_in_use or not self._restore_all(record)):
            return record
        # somebody removed the record while settings are changed: the current values are not the administrator's
        if is_in_use:
            return _UNKNOWN
        values = {name: sysctl.read() for name, sysctl in self._sysctls.items()}
        known = {name: value for name, value in values.items() if value is not None}
        record = SettingsRecord(self._boot(), known, self._workers.with_priority())
        self._write(record)
        return record

    def _load(self) -> SettingsRecord | None:
        """The record of this boot, if there is one that can be read."""
        try:
            record = SettingsRecord.decode((self._directory / _RECORD).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return record if record.boot == self._boot() else None

    def _write(self, record: SettingsRecord) -> None:
        """Write the record whole or not at all: a daemon may be killed at any moment."""
        fd, name = mkstemp(prefix=_NEW, dir=self._directory)
        try:
            os.write(fd, record.encode())
        finally:
            os.close(fd)
        os.rename(name, self._directory / _RECORD)

    def _forget(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._directory / _RECORD)

    def _boot(self) -> str:
        return (self._proc / "sys/kernel/random/boot_id").read_text().strip()

    def _new_user(self) -> tuple[int, str]:
        """Descriptor and name of a new user's file, which is locked before anybody can see it under that name."""
        if self._held is not None:
            return self._held, self._name_held(self._held)
        fd, name = mkstemp(prefix=_NEW, dir=self._directory)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            user = name.replace(_NEW, _USER)
            os.rename(name, user)
        except BaseException:
            os.close(fd)
            raise
        return fd, user

    def _name_held(self, held: int) -> str:
        idle = self._name_of(held, _HELD)
        if not idle:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._directory)
        user = idle.replace(_HELD, _USER)
        os.rename(idle, user)
        return user

    def _unname(self, user: int, file: str) -> None:
        """The user whose file has the name `file` is none any more."""
        if user == self._held:
            os.rename(file, file.replace(_USER, _HELD))
        else:
            os.unlink(file)

    def _name_of(self, held: int, prefix: str) -> str:
        """The name with `prefix` of a held user's file; '' if it has no such name, or somebody removed it."""
        wanted = os.fstat(held)
        for file in self._directory.glob(f"{prefix}*"):
            with suppress(FileNotFoundError):
                if os.path.samestat(file.lstat(), wanted):
                    return str(file)
        return ""

    def _living(self) -> bool:
        """Whether a user lives; removes the files of users that were killed. Under the lock."""
        users = list(self._users())
        gone = [file for file, is_free in (*users, *self._users(_HELD)) if is_free]
        for file in (*gone, *self._directory.glob(f"{_NEW}*")):
            with suppress(FileNotFoundError):
                os.unlink(file)
        return any(not is_free for _, is_free in users)

    def _users(self, prefix: str = _USER) -> Iterator[tuple[Path, bool]]:
        """Each user's file, or each file of `prefix`, and whether its lock is free."""
        for file in self._directory.glob(f"{prefix}*"):
            with suppress(FileNotFoundError):
                fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    # shared: two processes that check at once must not take each other for a living user
                    yield file, _try_lock(fd, fcntl.LOCK_SH)
                finally:
                    os.close(fd)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the lock under which the record is changed, and settings are restored by it. Raises Busy."""
        fd = os.open(self._directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # a wait with an end: flock(2) would wait for a stopped process for ever, and so would `tmemfs down`
            deadline = time.monotonic() + _LOCK_S
            while not _try_lock(fd):
                if time.monotonic() > deadline:
                    raise Busy(f"another process holds {self._directory / _LOCK}: see which one with 'fuser -v' and end it")
                time.sleep(_POLL_S)
            yield
        finally:
            os.close(fd)


def _try_lock(fd: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(file: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(file.read_bytes().partition(b"\n")[0])
    return None
