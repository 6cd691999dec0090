"""What commands and daemons of this machine tell each other: a lock and a record for each mount, in /run/tmemfs.d.

A command holds the lock for its whole time; no process that it starts does. So the kernel releases the lock when the command ends,
however it ends. The lock's file names the holder. A record says what was started with which options, so that a mount is found
again when its path no longer leads to it. It is written whole or not at all. A record whose daemon has ended and left nothing is
dropped when a command finds it.

Invariants:
1. Records and locks are named after the mountpoint without symbolic links (swapdev.resolved).
2. A lock that is held belongs to the file that has the name now. A lock's file is removed under the lock, so a process that gets a
   lock checks that the file is still there.
3. A process is told from a later one with the same number by its start time, and a boot from the next one by its id.

Source: flock(2), proc(5).
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import string
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

from tmemfs.errors import Refused
from tmemfs.system.proctext import parse_process, word_of

DIRECTORY: Final = Path("/run/tmemfs.d")
#: The lock under which a loop device is chosen and attached. No lock of a mount has this name: theirs end with '.lock'.
LOOP_DEVICES: Final = "loop-devices"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
#: A longer wait is reported on stderr.
_SAID_AFTER_S: Final = 1.0
_POLL_S: Final = 0.02
#: A file name has at most 255 bytes. A longer mountpoint keeps its end and a checksum of the whole.
_LONGEST_NAME: Final = 200
#: The address of a socket has at most 107 bytes.
_LONGEST_SOCKET_NAME: Final = 60
_PLAIN: Final = frozenset((string.ascii_letters + string.digits + "_.").encode())


@dataclass(frozen=True, slots=True)
class MountRecord:
    """One mount. `options` are the values that its daemon was started with, by option; `loop` is '' until there is one."""

    mountpoint: str
    pid: int
    started: int
    boot: str
    device: int
    version: str
    options: dict[str, str] = field(default_factory=dict)
    loop: str = ""
    diskseq: int = 0

    @property
    def daemon_lives(self) -> bool:
        """Whether the recorded process still runs."""
        return self.boot == boot_id() and process_started(self.pid) == self.started

    def with_loop(self, device: str, diskseq: int) -> MountRecord:
        """The record of the same mount, with its loop device."""
        return replace(self, loop=device, diskseq=diskseq)


def boot_id() -> str:
    """The id of this boot."""
    return word_of(_BOOT_ID.read_bytes())


def process_started(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since the boot; None if it has ended or is a zombie."""
    try:
        found = parse_process(Path(f"/proc/{pid}/stat").read_bytes())
    except OSError:
        return None
    return None if found.state in ("Z", "X") else found.started


def runtime_directory(directory: Path | None = None) -> Path:
    """The directory for root's locks and records, or `directory` instead; created if it is missing. Raises Refused."""
    # its own rights are checked too: a user who can write to it could lock out every command, or plant records
    place = directory or DIRECTORY
    try:
        with suppress(FileExistsError):
            place.mkdir(mode=0o700)
        found = place.lstat()
    except OSError as error:
        raise Refused(f"cannot create {place} ({error.strerror}): tmemfs needs it for its locks") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise Refused(f"{place} is not a directory that only root can write to: remove it")
    return place


def name_for(mountpoint: Path, longest: int = _LONGEST_NAME) -> str:
    """The file name for `mountpoint`: 'run-tmemfs' for /run/tmemfs."""
    path = os.fsencode(mountpoint)
    name = "".join("-" if byte == 0x2F else chr(byte) if byte in _PLAIN else f"%{byte:02x}" for byte in path.lstrip(b"/"))
    return name if len(name) <= longest else f"{name[-longest:]}%{zlib.crc32(path):08x}"


def status_path(mountpoint: Path) -> Path:
    """The file with the status region of the daemon of `mountpoint`, which has no symbolic links. Raises Refused."""
    return runtime_directory() / f"{name_for(mountpoint)}.status"


def upgrade_path(mountpoint: Path) -> Path:
    """The socket at which the daemon of `mountpoint`, which has no symbolic links, is asked to upgrade. Raises Refused."""
    return runtime_directory() / f"{name_for(mountpoint, _LONGEST_SOCKET_NAME)}.upgrade"


def lock_of(mountpoint: Path) -> str:
    """The name of the lock of `mountpoint`."""
    return f"{name_for(mountpoint)}.lock"


@contextmanager
def locked(name: str, command: str) -> Iterator[None]:
    """Hold the lock `name` for `command`; a long wait names the holder on stderr. Raises Refused."""
    path = runtime_directory() / name
    fd = _locked(path)
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} ({command})".encode(errors="surrogateescape"), 0)
        yield
    finally:
        # before the lock is released: the next process to get it sees that the file is gone (invariant 2)
        with suppress(FileNotFoundError):
            path.unlink()
        os.close(fd)


def _locked(path: Path) -> int:
    """A descriptor of the file at `path` that holds its lock."""
    while True:
        # O_CLOEXEC: a daemon that inherited the descriptor would hold the lock for as long as it lives
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _wait_for(fd)
            # the last holder removed the file that we opened: try the new one (invariant 2)
            if _is_at(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _wait_for(fd: int) -> None:
    # without blocking at first: most waits are short, and nobody needs to know of them
    deadline = time.monotonic() + _SAID_AFTER_S
    while time.monotonic() < deadline:
        with suppress(BlockingIOError):
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(_POLL_S)
    holder = os.fsdecode(os.pread(fd, 4096, 0)) or "unknown"
    print(f"tmemfs: waiting for process {holder}, which holds the same lock", file=sys.stderr, flush=True)
    fcntl.flock(fd, fcntl.LOCK_EX)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def write_record(record: MountRecord) -> None:
    """Write `record` in place of an older one of the same mountpoint."""
    path = _path_of(Path(record.mountpoint))
    new = path.with_suffix(f".{os.getpid()}")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="ascii") as file:
        json.dump(asdict(record), file, indent=1)
    # a reader sees the old record or the new one, never a part of it
    os.replace(new, path)


def read_record(mountpoint: Path) -> MountRecord | None:
    """The record of `mountpoint`, None if there is none that this version understands."""
    return _read(_path_of(mountpoint))


def read_records() -> list[MountRecord]:
    """All records that this version understands."""
    found = map(_read, sorted(runtime_directory().glob("*.json")))
    return [record for record in found if record is not None]


def remove_record(mountpoint: Path) -> None:
    """Remove the record of `mountpoint`, and what a supervisor left if it was killed: status region and socket."""
    for path in (_path_of(mountpoint), status_path(mountpoint), upgrade_path(mountpoint)):
        path.unlink(missing_ok=True)


def drop_record(record: MountRecord, is_locked: bool) -> None:
    """Remove `record`, unless another one has replaced it or a command works on its mount. `is_locked`: this process does."""
    mountpoint = Path(record.mountpoint)
    if is_locked:
        return remove_record(mountpoint)
    # no wait: the holder of the lock drops the record itself, and two processes that wait for each other's mount would deadlock
    path = runtime_directory() / lock_of(mountpoint)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(fd, path):
                if read_record(mountpoint) == record:
                    remove_record(mountpoint)
                path.unlink()
    finally:
        os.close(fd)


def _path_of(mountpoint: Path) -> Path:
    return runtime_directory() / f"{name_for(mountpoint)}.json"


def _read(path: Path) -> MountRecord | None:
    """The record in a file, None if it is missing or another version wrote what this one does not understand."""
    try:
        record = MountRecord(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    wanted = {"mountpoint": str, "pid": int, "started": int, "boot": str, "device": int, "options": dict, "diskseq": int}
    return record if all(isinstance(getattr(record, key), kind) for key, kind in wanted.items()) else None
