"""What the command shows and asks of a mount: control files in, tables and a progress bar out. Knows the control files' form."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from tmemfs import __version__
from tmemfs.cli.usage import suggestion
from tmemfs.errors import BadValue, Busy, FellShort, OutOfRange, Refused, TmemfsError
from tmemfs.units import PAGE_BYTES, format_size, parse_size

_BAR_AFTER_S: Final = 1.0
_BAR_CELLS: Final = 30
_POLL_S: Final = 0.1
_LINE_CELLS: Final = 80
_NAME_CELLS: Final = 13
#: More than the daemon says of a value that it refused.
_REASON_BYTES: Final = 4096
_ADMINISTRATORS: Final = "_administrators"

Values = dict[str, int | float | str]
InWords = Callable[[dict[str, str]], str]


def read_control(mountpoint: Path, key: str) -> str:
    """Text of a control file. Raises Refused, BadValue."""
    try:
        return _path(mountpoint, key).read_text(errors="surrogateescape")  # a path in it may be any bytes
    except OSError as error:
        raise _translated(error, mountpoint, key) from error


def write_control(mountpoint: Path, key: str, value: str) -> None:
    """Write one value. Raises the error that the daemon raised, with its own words where it says them."""
    reason: list[str] = []
    try:
        fd = os.open(_path(mountpoint, key), os.O_RDWR)
        try:
            _write(fd, f"{value}\n".encode(errors="surrogateescape"), reason)
        finally:
            os.close(fd)
    except OSError as error:
        raise _translated(error, mountpoint, key, value, *reason) from error


def _write(fd: int, value: bytes, reason: list[str]) -> None:
    """Write `value`; where that is refused, `reason` gets what the daemon says of it on the same descriptor."""
    before = os.pread(fd, _REASON_BYTES, 0)
    try:
        os.write(fd, value)
    except OSError:
        with suppress(OSError):
            said = os.pread(fd, _REASON_BYTES, 0)
            # a daemon of another version answers with the file's text, as before
            if said != before and said.strip() and b"\n" not in said.rstrip(b"\n"):
                reason.append(said.decode(errors="replace").strip())
        raise


def print_settings(mountpoint: Path) -> None:
    """Every control file that holds one value, 'key value' a line; of the state its first line."""
    try:
        keys = sorted(os.listdir(mountpoint / "control"))
    except OSError as error:
        raise _translated(error, mountpoint, "control") from error
    from tmemfs.control_files import FILES  # no other command needs it, and each is to start at once

    documents = {file.name for file in FILES if file.is_document}
    for key in keys:
        if key not in documents:
            first, _, more = read_control(mountpoint, key).partition("\n")
            if not more or key == "state":
                print(f"{key} {first}")


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
    show = str if in_bytes else format_size
    rows = [*_memory_rows(stat, show), *_activity_rows(stat, show)]
    rows.insert(1, ("state", _state(mountpoint)))
    if stat.get("version", __version__) != __version__:
        rows.insert(2, ("version", f"{stat['version']}; this command is {__version__}: 'tmemfs down' and 'up' start the new one"))
    for key, value in rows:
        name = f"{key + ':':{_NAME_CELLS}}" if headings else ""
        lines = textwrap.wrap(value, _LINE_CELLS - len(name), break_long_words=False, break_on_hyphens=False) or [""]
        print("\n".join((name if at == 0 else " " * len(name)) + line for at, line in enumerate(lines)))


def _memory_rows(stat: Values, show: Callable[[int], str]) -> list[tuple[str, str]]:
    """Where the pages are and what they take."""
    stored, compressed, pool = int(stat["pages_stored"]) * PAGE_BYTES, int(stat["compressed_bytes"]), int(stat["pool_current"])
    ratio = f" (ratio {stored / compressed:.2f})" if compressed else ""
    return [
        ("RAM saved", f"{show(stored - pool)}: {show(stored)} of pages swapped out, {show(pool)} of RAM in the pool"),
        ("swapped out", f"{show(stored)} of {show(int(stat['swap_size']))}"),
        ("compressed", f"{show(compressed)}{ratio}, {stat['codec']}"),
        ("pool", f"{show(pool)} of {show(int(stat['pool_max']))}, peak {show(int(stat['pool_peak']))}"),
        ("backing", f"{show(int(stat['backing_current']))} of {show(int(stat['backing_max']))}"),
        (
            "pages",
            f"{stat['pages_in_ram']} in RAM, {stat['pages_on_disk']} on disk; "
            f"{stat['same_filled_pages']} same-filled, {stat['incompressible_pages']} incompressible",
        ),
    ]


def _activity_rows(stat: Values, show: Callable[[int], str]) -> list[tuple[str, str]]:
    """How the pages lie, what happens to them, and how the daemon is protected."""
    return [
        (
            "density",
            f"space amplification {stat['ram_amplification']:.2f} in RAM, {stat['disk_amplification']:.2f} on disk; "
            f"write amplification {stat['write_amplification']:.2f}",
        ),
        ("pressure", f"{stat['pressure_state']}, {show(int(stat['pressure_headroom']))} of headroom"),
        *(("kernel", text) for text in _kernel_settings(stat)),
        ("loads", f"{stat['loads_ram']} from RAM, {stat['loads_disk']} from disk"),
        (
            "protection",
            f"memory: {'locked' if stat['memory_locked'] else 'not locked'}, "
            f"OOM killer: {'protected' if stat['oom_score_adj_set'] else 'not protected'}, "
            f"I/O flusher: {'yes' if stat['io_flusher'] else 'no'}, real-time priority: {'yes' if stat['realtime'] else 'no'}",
        ),
    ]


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
        near = suggestion(unknown[0], stat)
        raise BadValue(f"no column {unknown[0]!r}{near}: 'tmemfs stat --raw' lists all")
    cells = [_cell(column, stat[column], in_bytes) for column in columns]
    widths = [max(len(cell), len(column) if headings else 0) for cell, column in zip(cells, columns, strict=True)]
    for row in ([columns] if headings else []) + [cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(key: str, value: int | float | str, in_bytes: bool) -> str:
    """A figure as people read it: sizes with a unit, unless `in_bytes`; 'max' and '-' as the daemon says them."""
    from tmemfs.observe.registry import units  # no other command needs it, and each is to start at once

    return format_size(value) if isinstance(value, int | float) and units().get(key) == "bytes" and not in_bytes else str(value)


def print_what_next(mountpoint: Path) -> None:
    """What to try on a fresh swap."""
    option = "" if mountpoint == Path("/run/tmemfs") else f" --mountpoint {shlex.quote(str(mountpoint))}"
    commands = "\n".join(f"  tmemfs {command}{option}" for command in ("stat", "shrink 64M", "get", "down"))
    print(f"\nTry next:\n{commands}")


def shrink(mountpoint: Path, size: str, deadline_s: float | None, raw: bool = False) -> int:
    """Ask for a shrink and show its answer, in words on a terminal unless `raw`; gives the exit code."""

    def pool() -> int:
        return int(read_control(mountpoint, "pool.current"))

    try:
        floor = max(pool() - parse_size(size), 0)
    except BadValue:  # all of it; or no size at all, which the daemon says
        floor = 0
    value = size if deadline_s is None else f"{size} deadline={deadline_s:f}s"
    in_words = None if raw else _shrink_in_words
    return _ask(mountpoint, "shrink", value, "shrinking", lambda: max(pool() - floor, 0), in_words)


def compact(mountpoint: Path, factor: str, deadline_s: float | None = None, raw: bool = False) -> int:
    """Ask for a compaction and show its answer, in words on a terminal unless `raw`; gives the exit code."""
    value = factor if deadline_s is None else f"{factor} deadline={deadline_s:f}s"
    in_words = None if raw else _compact_in_words
    return _ask(mountpoint, "compact", value, "compacting", lambda: _above_factor(read_stat(mountpoint), factor), in_words)


def _shrink_in_words(answer: dict[str, str]) -> str:
    pages, seconds = answer["pages"], float(answer["seconds"])
    freed, written = (format_size(int(answer[key])) for key in ("freed", "written"))
    return f"freed {freed} of RAM in {seconds:.2f} s: {pages} pages, {written} written to disk"


def _compact_in_words(answer: dict[str, str]) -> str:
    written, seconds = format_size(int(answer["written"])), float(answer["seconds"])
    return (
        f"space amplification on disk was {answer['before']} and is {answer['after']}: {answer['segments']} segments cleaned, "
        f"{answer['frames']} MiB of RAM freed, {written} written in {seconds:.2f} s"
    )


def _above_factor(stat: Values, factor: str) -> int:
    """Bytes that the backing takes above `factor` by what lives there."""
    try:
        wanted = float(factor) * float(stat["backing_current"]) / float(stat["disk_amplification"])
        return max(int(float(stat["backing_current"]) - wanted), 0)
    except (ValueError, OverflowError):  # no number that can be meant, which the daemon says
        return 0


def _ask(mountpoint: Path, key: str, value: str, title: str, left: Callable[[], int], in_words: InWords | None) -> int:
    """Write a request that takes its time and show its answer, with a bar of the bytes that are `left` to do.

    The answer is shown as it is; on a terminal `in_words`, if that is given.

    A signal ends the request, not the command, which shows how far the request came; a second one ends the command.
    """
    failed: FellShort | None = None
    with Bar(title) as bar, _shown(bar, left), _signals_noted():
        try:
            write_control(mountpoint, key, value)
        except FellShort as error:
            failed = error
    answer = read_control(mountpoint, key)
    print(in_words(_flat(answer)) + "\n" if in_words and sys.stdout.isatty() else answer, end="")
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


def _flat(answer: str) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in answer.splitlines())


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
    if "/" in key or "\0" in key or key in ("", ".", ".."):
        raise BadValue(f"{key!r} is not a control file: see 'ls {mountpoint}/control'")
    return mountpoint / "control" / key


def _translated(error: OSError, mountpoint: Path, key: str, value: str | None = None, reason: str = "") -> TmemfsError:
    """The error that the errno of a control file stands for: in the daemon's words (`reason`), or in our own."""
    if error.errno in (errno.ENOENT, errno.ENAMETOOLONG, errno.ENOTDIR):
        return _not_there(mountpoint, key, error)
    if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
        return Refused(f"the daemon of {mountpoint} has gone: run 'tmemfs down {mountpoint}' to clean up")
    kind, ours = _meaning(error, mountpoint / "control", key, value)
    return kind(f"{key}: {reason}" if reason else ours)


def _not_there(mountpoint: Path, key: str, error: OSError) -> TmemfsError:
    try:
        known = sorted(os.listdir(mountpoint / "control"))
    except FileNotFoundError:
        return Refused(f"nothing is mounted at {mountpoint}: run 'tmemfs up' or give the mountpoint")
    except OSError as cannot:
        return Refused(f"cannot use the mountpoint {mountpoint} ({cannot.strerror}): run 'tmemfs up' or give another one")
    return BadValue(f"no control file {key!r}{suggestion(key, known)}: choose from {', '.join(known)}")


def _meaning(error: OSError, control: Path, key: str, value: str | None) -> tuple[type[TmemfsError], str]:
    """What an errno of a control file means, and what to do."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return Refused, f"{key} cannot be {'read' if value is None else 'written'}: see 'ls -l {control}', and run as root"
    if error.errno == errno.EINVAL:
        return BadValue, f"{value!r} is not a value of {key}: see docs/control.md for what it takes"
    if error.errno == errno.ERANGE:
        return OutOfRange, f"{value} is out of range for {key}: it now is {_current(control / key)}, see docs/control.md"
    if error.errno == errno.EBUSY:
        return Busy, f"{key} cannot become {value} now: see {control}/state and {control}/shrink for why"
    if error.errno == errno.EAGAIN:
        return FellShort, f"{key} {' '.join(str(value).split()[:1])} fell short: the reason is in {control / key}"
    return Refused, f"{control / key}: {error.strerror}: see 'tmemfs doctor'"


def _current(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "unknown"
