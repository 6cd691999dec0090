"""Reads and writes the control files of a mount, and turns an errno back into the error that the daemon raised.

Knows the form of the control files, and neither what they mean nor how they are shown. The daemon may be of another version.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from tmemfs.cli.usage import suggestion
from tmemfs.errors import BadValue, Busy, FellShort, OutOfRange, Refused, TmemfsError
from tmemfs.system.in_time import in_time

#: Longer than any reason that the daemon gives for a refused value.
_REASON_BYTES: Final = 4096

Values = dict[str, int | float | str]


def read_control(mountpoint: Path, key: str) -> str:
    """Text of a control file. Raises Refused, BadValue."""
    try:
        return _path(mountpoint, key).read_text(errors="surrogateescape")  # a path in it may be any bytes
    except OSError as error:
        raise _translated(error, mountpoint, key) from error


def write_control(mountpoint: Path, key: str, value: str) -> None:
    """Write one value. Raises the error that the daemon raised, with the daemon's reason if it gives one."""
    reason: list[str] = []
    try:
        # O_RDWR, because a reason is read on the descriptor of the write that was refused
        fd = os.open(_path(mountpoint, key), os.O_RDWR)
        try:
            _write(fd, f"{value}\n".encode(errors="surrogateescape"), reason)
        finally:
            os.close(fd)
    except OSError as error:
        raise _translated(error, mountpoint, key, value, *reason) from error


def _write(fd: int, value: bytes, reason: list[str]) -> None:
    """Write `value`. If it is refused, append to `reason` what the daemon then says on the same descriptor."""
    before = os.pread(fd, _REASON_BYTES, 0)
    try:
        os.write(fd, value)
    except OSError:
        with suppress(OSError):
            said = os.pread(fd, _REASON_BYTES, 0)
            # a daemon of an older version gives no reason: it answers with the file's text, as before the write
            if said != before and said.strip() and b"\n" not in said.rstrip(b"\n"):
                reason.append(said.decode(errors="replace").strip())
        raise


def control_names(mountpoint: Path) -> list[str]:
    """Names of the control files of a mount, sorted. Raises Refused."""
    try:
        return sorted(os.listdir(mountpoint / "control"))
    except OSError as error:
        raise _translated(error, mountpoint, "control") from error


def read_in_time(mountpoint: Path, key: str) -> str:
    """As read_control, but raises NoAnswer where the daemon does not answer in time."""
    return in_time(partial(read_control, mountpoint, key))


def read_stat(mountpoint: Path) -> Values:
    """Keys and values of control/stat. Raises NoAnswer, too."""
    return parse_stat(read_in_time(mountpoint, "stat"))


def parse_stat(text: str) -> Values:
    """Keys and values of a flat keyed file; numbers are numbers."""
    pairs = (line.partition(" ") for line in text.splitlines())
    return {key: _value(value) for key, _, value in pairs}


def read_state_and_stat(mountpoint: Path) -> tuple[str, Values]:
    """The first line of control/state, and what read_stat returns, within the time for one answer."""
    state, stat = in_time(lambda: (read_control(mountpoint, "state"), read_control(mountpoint, "stat")))
    return state.splitlines()[0], parse_stat(stat)


def _value(text: str) -> int | float | str:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        return text


def _path(mountpoint: Path, key: str) -> Path:
    # a key is a word of the command line: with a slash it would name any file of the machine
    if "/" in key or "\0" in key or key in ("", ".", ".."):
        raise BadValue(f"{key!r} is not a control file: see 'ls {mountpoint}/control'")
    return mountpoint / "control" / key


def _translated(error: OSError, mountpoint: Path, key: str, value: str | None = None, reason: str = "") -> TmemfsError:
    """The TmemfsError for the errno of a control file, with the daemon's `reason` or with a message of our own."""
    if error.errno in (errno.ENOENT, errno.ENAMETOOLONG, errno.ENOTDIR):
        return _not_there(mountpoint, key, error)
    if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):  # what FUSE answers once nobody serves the mount
        return Refused(f"the daemon of {mountpoint} has gone: run 'tmemfs down {mountpoint}' to clean up")
    kind, ours = _meaning(error, mountpoint / "control", key, value)
    return kind(f"{key}: {reason}" if reason else ours)


def _not_there(mountpoint: Path, key: str, error: OSError) -> TmemfsError:
    # a missing file has three causes, and each another next step: no mount, no access to it, or a wrong name
    try:
        known = sorted(os.listdir(mountpoint / "control"))
    except FileNotFoundError:
        return Refused(f"nothing is mounted at {mountpoint}: run 'tmemfs up' or give the mountpoint")
    except OSError as cannot:
        return Refused(f"cannot use the mountpoint {mountpoint} ({cannot.strerror}): run 'tmemfs up' or give another one")
    return BadValue(f"no control file {key!r}{suggestion(key, known)}: choose from {', '.join(known)}")


def _meaning(error: OSError, control: Path, key: str, value: str | None) -> tuple[type[TmemfsError], str]:
    """The class of error that an errno of a control file stands for, and a message with the next step.

    The reverse of fuse/errnos.py, as far as errors have a number of their own.
    """
    if error.errno in (errno.EACCES, errno.EPERM):
        return Refused, f"{key} cannot be {'read' if value is None else 'written'}: see 'ls -l {control}', and run as root"
    if error.errno == errno.EINVAL:
        return BadValue, f"{value!r} is not a value of {key}: see docs/control.md for what it takes"
    if error.errno == errno.ERANGE:
        return OutOfRange, f"{value} is out of range for {key}: it now is {_current(control / key)}, see docs/control.md"
    if error.errno == errno.EBUSY:
        return Busy, f"{key} cannot become {value} now: see {control}/state and {control}/shrink for why"
    if error.errno == errno.EAGAIN:  # the first word alone: the deadline that may follow was not what fell short
        return FellShort, f"{key} {' '.join(str(value).split()[:1])} fell short: the reason is in {control / key}"
    return Refused, f"{control / key}: {error.strerror}: see 'tmemfs doctor'"


def _current(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # it only completes a message, whose own error is the one to report
        return "unknown"
