"""What the command shows of a mount and asks of it: control files in, tables and a progress bar out.

Units come from the registry of metrics, which is loaded only where a unit is needed. The daemon may be of another version, so what
it says decides which keys there are.
"""

from __future__ import annotations

import json
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
from tmemfs.cli.control_io import Values, control_names, parse_stat, read_control, read_stat, read_state_and_stat, write_control
from tmemfs.cli.usage import suggestion
from tmemfs.errors import BadValue, FellShort, TmemfsError
from tmemfs.units import PAGE_BYTES, format_size, parse_size

_BAR_AFTER_S: Final = 1.0
_BAR_CELLS: Final = 30
_POLL_S: Final = 0.1
_LINE_CELLS: Final = 80
_NAME_CELLS: Final = 13
_ADMINISTRATORS: Final = "_administrators"

InWords = Callable[[dict[str, str]], str]


def print_settings(mountpoint: Path) -> None:
    """Print every control file that holds one value, as 'key value' lines, and the first line of the state."""
    from tmemfs.control_files import FILES  # no other command needs it, and each is to start at once

    documents = {file.name for file in FILES if file.is_document}
    for key in control_names(mountpoint):
        if key not in documents:
            first, _, more = read_control(mountpoint, key).partition("\n")
            if not more or key == "state":  # a newer daemon may have documents that this command does not know
                print(f"{key} {first}")


def print_stat(mountpoint: Path, in_bytes: bool = False, headings: bool = True) -> None:
    """Print the lines that matter to a person."""
    state, stat = read_state_and_stat(mountpoint)
    show = str if in_bytes else format_size
    rows = [*_memory_rows(stat, show), *_activity_rows(stat, show)]
    rows.insert(1, ("state", state))
    # a new command talks to the old daemon until it is told to take over: the files are installed, nothing is restarted
    if stat.get("version", __version__) != __version__:
        rows.insert(2, ("version", f"{stat['version']}; this command is {__version__}: 'tmemfs upgrade' has it take over"))
    print_rows(rows, headings)


def print_rows(rows: list[tuple[str, str]], headings: bool = True) -> None:
    """Print names and values as a table."""
    for key, value in rows:
        name = f"{key + ':':{_NAME_CELLS}}" if headings else ""
        # paths and keys stay whole, so that they can be copied
        lines = textwrap.wrap(value, _LINE_CELLS - len(name), break_long_words=False, break_on_hyphens=False) or [""]
        print("\n".join((name if at == 0 else " " * len(name)) + line for at, line in enumerate(lines)))


def _memory_rows(stat: Values, show: Callable[[int], str]) -> list[tuple[str, str]]:
    """Rows that say where the pages are and what they occupy."""
    stored, compressed, pool = int(stat["pages_stored"]) * PAGE_BYTES, int(stat["compressed_bytes"]), int(stat["pool_current"])
    ratio = f" (ratio {stored / compressed:.2f})" if compressed else ""
    return [
        ("RAM saved", f"{show(stored - pool)}: {show(stored)} of pages swapped out, {show(pool)} of RAM in the pool"),
        ("swapped out", f"{show(stored)} of {show(int(stat['swap_size']))}"),
        ("compressed", f"{show(compressed)}{ratio}, {stat['codec']}"),
        ("pool", f"{show(pool)} of {show(int(stat['pool_max']))}, peak {show(int(stat['pool_peak']))}{_clean(stat, show)}"),
        ("backing", f"{show(int(stat['backing_current']))} of {show(int(stat['backing_max']))}" + _encrypted(stat)),
        (
            "pages",
            f"{stat['pages_in_ram']} in RAM, {stat['pages_on_disk']} on disk; "
            f"{stat['same_filled_pages']} same-filled, {stat['incompressible_pages']} incompressible",
        ),
    ]


def _clean(stat: Values, show: Callable[[int], str]) -> str:
    clean = int(stat.get("pool_clean", "0"))  # not of a daemon of an older version
    return f"; {show(clean)} can be had at once" if clean else ""


def _encrypted(stat: Values) -> str:
    """What is said of the backing where it is encrypted; an older daemon does not say."""
    return ", encrypted" if stat.get("backing_encrypted") else ""


def _activity_rows(stat: Values, show: Callable[[int], str]) -> list[tuple[str, str]]:
    """Rows that say how densely pages lie, what happens to them, and how the daemon is protected."""
    return [
        *(("restarts", text) for text in _restarts(stat)),
        (
            "density",
            f"space amplification {stat['ram_amplification']:.2f} in RAM, {stat['disk_amplification']:.2f} on disk; "
            f"write amplification {stat['write_amplification']:.2f}",
        ),
        *(("pressure", text) for text in _pressure(stat, show)),
        *(("kernel", text) for text in _kernel_settings(stat)),
        ("loads", f"{stat['loads_ram']} from RAM, {stat['loads_disk']} from disk"),
        (
            "protection",
            f"memory: {'locked' if stat['memory_locked'] else 'not locked'}, "
            f"OOM killer: {_oom(stat)}, "
            f"I/O flusher: {'yes' if stat['io_flusher'] else 'no'}, real-time priority: {'yes' if stat['realtime'] else 'no'}",
        ),
    ]


def _oom(stat: Values) -> str:
    if stat["oom_score_adj_set"]:
        return "protected"
    return "takes the worker first" if stat.get("oom_worker_first") == 1 else "not protected"


def _restarts(stat: Values) -> list[str]:
    """How often the worker was replaced, and why; nothing if it never was."""
    # a daemon of an older version does not count them, and one that was built into a program has no worker
    counts = {cause: count for cause in ("killed", "crashed", "hung") if isinstance(count := stat.get(f"worker_{cause}"), int)}
    if not any(counts.values()):
        return []
    causes = ", ".join(f"{count} {cause}" for cause, count in counts.items() if count)
    return [f"the worker was replaced {sum(counts.values())} times ({causes}); process {stat['worker_pid']} serves now"]


def _pressure(stat: Values, show: Callable[[int], str]) -> list[str]:
    """The state of the pressure controller, and the headroom."""
    # an older daemon has other names for both: the rest of its figures are shown all the same
    if "pressure_state" not in stat or "pressure_headroom" not in stat:
        return []
    return [f"{stat['pressure_state']}, {show(int(stat['pressure_headroom']))} of headroom"]


def _kernel_settings(stat: Values) -> list[str]:
    """One line per kernel setting whose value now is not the administrator's."""
    # found by their suffix rather than by name: a newer daemon may change settings that this command does not know
    settings = {key.removesuffix(_ADMINISTRATORS): value for key, value in stat.items() if key.endswith(_ADMINISTRATORS)}
    return [f"vm.{name} {stat[name]} (yours: {value})" for name, value in settings.items() if stat[name] != value]


def print_json(mountpoint: Path) -> None:
    """Print control/stat as one JSON object."""
    state, stat = read_state_and_stat(mountpoint)
    print(json.dumps({"state": state, **stat}, indent=2))


def print_columns(mountpoint: Path, columns: list[str], in_bytes: bool, headings: bool) -> None:
    """Print the figures named `columns` in one row. Raises BadValue for an unknown name."""
    # what the daemon has decides, not the registry of this command: the two may be of different versions
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
    """A figure as people read it: a size with a unit, unless `in_bytes`; 'max' and '-' as they are."""
    from tmemfs.observe.registry import units  # no other command needs it, and each is to start at once

    return format_size(value) if isinstance(value, int | float) and units().get(key) == "bytes" and not in_bytes else str(value)


def print_what_next(mountpoint: Path) -> None:
    """Print commands to try on a fresh swap."""
    option = "" if mountpoint == Path("/run/tmemfs") else f" --mountpoint {shlex.quote(str(mountpoint))}"
    commands = "\n".join(f"  tmemfs {command}{option}" for command in ("stat", "shrink 64M", "get", "down"))
    print(f"\nTry next:\n{commands}")


def shrink(mountpoint: Path, size: str, deadline_s: float | None, raw: bool = False) -> int:
    """Ask for a shrink and print its answer, in words on a terminal unless `raw`. Returns the exit code. Raises FellShort."""

    def pool() -> int:
        return int(read_control(mountpoint, "pool.current"))

    try:
        floor = max(pool() - parse_size(size), 0)
    except BadValue:  # 'all', for which 0 is right, or no size at all, which the daemon refuses with its own words
        floor = 0
    value = size if deadline_s is None else f"{size} deadline={deadline_s:f}s"
    in_words = None if raw else _shrink_in_words
    return _ask(mountpoint, "shrink", value, "shrinking", lambda: max(pool() - floor, 0), in_words)


def compact(mountpoint: Path, factor: str, deadline_s: float | None = None, raw: bool = False) -> int:
    """Ask for a compaction and print its answer, in words on a terminal unless `raw`. Returns the exit code. Raises FellShort."""
    value = factor if deadline_s is None else f"{factor} deadline={deadline_s:f}s"
    in_words = None if raw else _compact_in_words

    def above() -> int:
        # not read_stat, which takes a process each time
        return _above_factor(parse_stat(read_control(mountpoint, "stat")), factor)

    return _ask(mountpoint, "compact", value, "compacting", above, in_words)


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
    """Bytes of the backing above a space amplification of `factor`."""
    try:
        wanted = float(factor) * float(stat["backing_current"]) / float(stat["disk_amplification"])
        return max(int(float(stat["backing_current"]) - wanted), 0)
    except (ValueError, OverflowError):  # no factor at all, or inf or nan, which the daemon refuses with its own words
        return 0


def _ask(mountpoint: Path, key: str, value: str, title: str, left: Callable[[], int], in_words: InWords | None) -> int:
    """Write a request that may take long and print its answer, with a bar of the bytes that are `left` meanwhile.

    The answer is printed as it is, or `in_words` on a terminal.

    A signal ends the request and not the command, which then prints how far the request came. A second signal ends the command.
    """
    failed: FellShort | None = None
    with Bar(title) as bar, _shown(bar, left), _signals_noted():
        try:
            write_control(mountpoint, key, value)
        except FellShort as error:  # raised only after the answer is printed, which says how far it came
            failed = error
    answer = read_control(mountpoint, key)
    print(in_words(_flat(answer)) + "\n" if in_words and sys.stdout.isatty() else answer, end="")
    if failed:
        raise failed
    return 0


@contextmanager
def _shown(bar: Bar, left: Callable[[], int]) -> Iterator[None]:
    """Have `bar` show what is `left`, from a thread of its own.

    The main thread writes the request: only there does a signal interrupt the write, which ends the request.
    """
    before, done = left(), threading.Event()

    def show() -> None:
        with suppress(TmemfsError):  # the request fails for the same reason, and reports it
            while not done.wait(_POLL_S):
                bar.left(left(), before)

    # a read of a control file may hang with the daemon: a daemon thread does not keep the command from ending
    showing = threading.Thread(target=show, daemon=True)
    showing.start()
    try:
        yield
    finally:
        done.set()
        showing.join(1.0)


@contextmanager
def _signals_noted() -> Iterator[None]:
    """Let the first SIGINT or SIGTERM do no more than interrupt the write that the process waits for."""

    def note(number: int, frame: object) -> None:
        # a handler that returns: the kernel tells the daemon of the interrupt, and the second signal ends the command
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # nohup and the like have a signal ignored for a reason
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
    """A progress bar on standard error, shown on a terminal once something has taken longer than a second."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._began = time.monotonic()
        self._shown = False

    def __enter__(self) -> Bar:
        return self

    def left(self, left_bytes: int, all_bytes: int) -> None:
        """Show that `left_bytes` of `all_bytes` are still to do. Shows nothing where there is nothing to do."""
        if not sys.stderr.isatty() or time.monotonic() - self._began < _BAR_AFTER_S or not all_bytes:
            return
        self._shown = True
        # more may be left than there was: the pool grows while it is shrunk
        done = _BAR_CELLS - min(_BAR_CELLS * left_bytes // all_bytes, _BAR_CELLS)
        bar = "#" * done + "." * (_BAR_CELLS - done)
        print(f"\r{self._title} [{bar}] {format_size(left_bytes)} left \033[K", end="", file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
