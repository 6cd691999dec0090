"""What the command shows and asks of a mount: control files in, tables and a progress bar out. Knows the control files' form."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from tmemfs.errors import BadValue, Busy, FellShort, OutOfRange, Refused, TmemfsError
from tmemfs.units import PAGE_BYTES, format_size, parse_size

_BAR_AFTER_S: Final = 1.0
_BAR_CELLS: Final = 30
_POLL_S: Final = 0.1
_SIZES: Final = frozenset(
    ("swap_size", "compressed_bytes", "pool_current", "pool_used", "pool_peak", "pool_max", "pool_resident", "backing_current",
     "backing_max", "bytes_written", "bytes_released", "disk_read_bytes", "table_bytes", "resident_anon", "resident_file",
     "resident_shmem")
)  # fmt: skip

_ADMINISTRATORS: Final = "_administrators"

Values = dict[str, int | float | str]


def read_control(mountpoint: Path, key: str) -> str:
    """Text of a control file. Raises Refused, BadValue."""
    try:
        return _path(mountpoint, key).read_text()
    except OSError as error:
        raise _translated(error, mountpoint, key) from error


def write_control(mountpoint: Path, key: str, value: str) -> None:
    """Write one value. Raises what the errno says."""
    try:
        fd = os.open(_path(mountpoint, key), os.O_WRONLY)
        try:
            os.write(fd, f"{value}\n".encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise _translated(error, mountpoint, key, value) from error


def read_stat(mountpoint: Path) -> Values:
    """control/stat, numbers as numbers."""
    pairs = (line.partition(" ") for line in read_control(mountpoint, "stat").splitlines())
    return {key: _value(text) for key, _, text in pairs}


def _state(mountpoint: Path) -> str:
    return read_control(mountpoint, "state").splitlines()[0]


def _value(text: str) -> int | float | str:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        return text


def print_stat(mountpoint: Path, in_bytes: bool = False, headings: bool = True) -> None:
    """The lines that matter to a person."""
    stat = read_stat(mountpoint)
    stored, compressed = int(stat["pages_stored"]) * PAGE_BYTES, int(stat["compressed_bytes"])
    ratio = f" (ratio {stored / compressed:.2f})" if compressed else ""
    show = str if in_bytes else format_size
    rows = [
        ("state", _state(mountpoint)),
        ("swapped out", f"{show(stored)} of {show(int(stat['swap_size']))}"),
        ("compressed", f"{show(compressed)}{ratio}, {stat['codec']}"),
        ("pool", f"{show(int(stat['pool_current']))} of {show(int(stat['pool_max']))}, peak {show(int(stat['pool_peak']))}"),
        ("backing", f"{show(int(stat['backing_current']))} of {show(int(stat['backing_max']))}"),
        ("pages", f"{stat['pages_in_ram']} in RAM, {stat['pages_on_disk']} on disk, {stat['same_filled_pages']} same-filled, "
            f"{stat['incompressible_pages']} incompressible"),
        ("density", f"{stat['ram_amplification']:.2f} bytes a live byte in RAM, {stat['disk_amplification']:.2f} on disk; "
            f"{stat['write_amplification']:.2f} bytes written a byte stored"),
        ("pressure", f"{stat['pressure_zone']}, {show(int(stat['pressure_room']))} of room"),
        *(("kernel", text) for text in _kernel_settings(stat)),
        ("loads", f"{stat['loads_ram']} from RAM, {stat['loads_disk']} from disk"),
        ("protection", f"memory locked {stat['memory_locked']}, I/O flusher {stat['io_flusher']}, "
            f"OOM score {stat['oom_score_adj_set']}, real-time {stat['realtime']}"),
    ]  # fmt: skip
    for key, value in rows:
        print(f"{key + ':':13}{value}" if headings else value)


def _kernel_settings(stat: Values) -> list[str]:
    """A line for each setting of the kernel that differs from the administrator's value now."""
    settings = {key.removesuffix(_ADMINISTRATORS): value for key, value in stat.items() if key.endswith(_ADMINISTRATORS)}
    return [f"vm.{name} {stat[name]} (yours: {value})" for name, value in settings.items() if stat[name] != value]


def print_json(mountpoint: Path) -> None:
    """control/stat as one object."""
    print(json.dumps({"state": _state(mountpoint), **read_stat(mountpoint)}, indent=2))


def print_columns(mountpoint: Path, columns: list[str], in_bytes: bool, headings: bool) -> None:
    """The figures named, in one row. Raises BadValue for a name there is none of."""
    stat = read_stat(mountpoint)
    unknown = [column for column in columns if column not in stat]
    if unknown:
        raise BadValue(f"no column {', '.join(unknown)}: choose from {', '.join(stat)}")
    values = [stat[column] for column in columns]
    cells = [
        format_size(int(value)) if column in _SIZES and not in_bytes else str(value)
        for column, value in zip(columns, values, strict=True)
    ]
    widths = [max(len(cell), len(column) if headings else 0) for cell, column in zip(cells, columns, strict=True)]
    for row in ([columns] if headings else []) + [cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def print_what_next(mountpoint: Path) -> None:
    """What to try on a fresh swap."""
    place = "" if mountpoint == Path("/run/tmemfs") else f" {mountpoint}"
    option = f" --mountpoint {mountpoint}" if place else ""
    print(
        f"\nTry next:\n  tmemfs stat{place}\n  tmemfs shrink 64M{option}\n  cat {mountpoint}/control/mm_stat\n  tmemfs down{place}"
    )


def shrink(mountpoint: Path, size: str, deadline_s: float | None) -> int:
    """Ask for a shrink and show its answer; gives the exit code."""

    def pool() -> int:
        return int(read_control(mountpoint, "pool.current"))

    try:
        floor = max(pool() - parse_size(size), 0)
    except BadValue:  # all of it; or no size at all, which the daemon says
        floor = 0
    value = size if deadline_s is None else f"{size} deadline={deadline_s:f}s"
    return _ask(mountpoint, "shrink", value, "shrinking", lambda: max(pool() - floor, 0))


def compact(mountpoint: Path, factor: str, deadline_s: float | None = None) -> int:
    """Ask for a compaction and show its answer; gives the exit code."""
    value = factor if deadline_s is None else f"{factor} deadline={deadline_s:f}s"
    return _ask(mountpoint, "compact", value, "compacting", lambda: _above_factor(read_stat(mountpoint), factor))


def _above_factor(stat: Values, factor: str) -> int:
    """Bytes that the backing takes above `factor` by what lives there."""
    try:
        wanted = float(factor) * float(stat["backing_current"]) / float(stat["disk_amplification"])
        return max(int(float(stat["backing_current"]) - wanted), 0)
    except (ValueError, OverflowError):  # no number that can be meant, which the daemon says
        return 0


def _ask(mountpoint: Path, key: str, value: str, title: str, left: Callable[[], int]) -> int:
    """Write a request that takes its time and show its answer, with a bar of the bytes that are `left` to do.

    A signal ends the request, not the command, which shows how far the request came; a second one ends the command.
    """
    failed: FellShort | None = None
    with Bar(title) as bar, _shown(bar, left), _signals_noted():
        try:
            write_control(mountpoint, key, value)
        except FellShort as error:
            failed = error
    print(read_control(mountpoint, key), end="")
    if failed:
        raise failed
    return 0


@contextmanager
def _shown(bar: Bar, left: Callable[[], int]) -> Iterator[None]:
    """Have `bar` show what is `left`, in a thread: the one that writes is the one that signals are for."""
    before, done = left(), threading.Event()

    def show() -> None:
        with suppress(TmemfsError):  # the request says it
            while not done.wait(_POLL_S):
                bar.left(left(), before)

    showing = threading.Thread(target=show, daemon=True)
    showing.start()
    try:
        yield
    finally:
        done.set()
        showing.join(1.0)


@contextmanager
def _signals_noted() -> Iterator[None]:
    """Let the first SIGINT or SIGTERM do no more than interrupt what the process waits for."""

    def note(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    noted = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in noted:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in noted.items():
            signal.signal(number, handler)


class Bar:
    """A progress bar on a terminal, once something has taken longer than a second; silent elsewhere."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._began = time.monotonic()
        self._shown = False

    def __enter__(self) -> Bar:
        return self

    def left(self, left_bytes: int, all_bytes: int) -> None:
        """Show that `left_bytes` of `all_bytes` are still to do."""
        if not sys.stderr.isatty() or time.monotonic() - self._began < _BAR_AFTER_S or not all_bytes:
            return
        self._shown = True
        done = _BAR_CELLS - min(_BAR_CELLS * left_bytes // all_bytes, _BAR_CELLS)
        bar = "#" * done + "." * (_BAR_CELLS - done)
        print(f"\r{self._title} [{bar}] {format_size(left_bytes)} left \033[K", end="", file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _path(mountpoint: Path, key: str) -> Path:
    if "/" in key or not key:
        raise BadValue(f"{key!r} is not a control file: see 'ls {mountpoint}/control'")
    return mountpoint / "control" / key


def _translated(error: OSError, mountpoint: Path, key: str, value: str | None = None) -> TmemfsError:
    """What an errno of a control file means, and what to do."""
    control = mountpoint / "control"
    if error.errno == errno.ENOENT:
        if not control.is_dir():
            return Refused(f"nothing is mounted at {mountpoint}: run 'tmemfs up' or give the mountpoint")
        return BadValue(f"no control file {key!r}: choose from {', '.join(sorted(os.listdir(control)))}")
    if error.errno in (errno.EACCES, errno.EPERM):
        return Refused(f"{key} cannot be {'read' if value is None else 'written'}: see 'ls -l {control}', and run as root")
    if error.errno == errno.EINVAL:
        return BadValue(f"{value!r} is not a value of {key}: see docs/control.md for what it takes")
    if error.errno == errno.ERANGE:
        return OutOfRange(f"{value} is out of range for {key}: it now is {_current(control / key)}, see docs/control.md")
    if error.errno == errno.EBUSY:
        return Busy(f"{key} cannot become {value} now: see {control}/state and {control}/shrink for why")
    if error.errno == errno.EAGAIN:
        return FellShort(f"{key} {str(value).split()[0]} fell short: the reason is in {control / key}")
    if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
        return Refused(f"the daemon of {mountpoint} has gone: run 'tmemfs down {mountpoint}' to clean up")
    return Refused(f"{control / key}: {error.strerror}: see 'tmemfs doctor'")


def _current(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "unknown"
