"""What the command shows, from a directory of plain files instead of a mount; and what it makes of an errno."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.parts import FaultyTier, Regions, new_limits, new_pressure, page_of
from tests.waiting import HANG_S
from tmemfs import __version__
from tmemfs.cli import control_io, view
from tmemfs.control import ControlDirectory
from tmemfs.engine import Engine
from tmemfs.errors import BadValue, Busy, FellShort, OutOfRange, Refused, TmemfsError
from tmemfs.fuse.errnos import errno_of
from tmemfs.jobs.shrink_request import ShrinkRequest
from tmemfs.jobs.supervision import Jobs
from tmemfs.observe.registry import units
from tmemfs.services import Services
from tmemfs.store.codec import encode, parse_codec
from tmemfs.units import MIB, parse_seconds

STAT = {
    "daemon_pid": 4711,
    "codec": "zstd:3",
    "swap_size": 8 << 30,
    "pages_stored": 1000,
    "pages_in_ram": 700,
    "pages_on_disk": 200,
    "same_filled_pages": 110,
    "incompressible_pages": 30,
    "compressed_bytes": 2048000,
    "pool_current": 3 * MIB,
    "pool_max": 64 * MIB,
    "pool_peak": 5 * MIB,
    "backing_current": MIB,
    "backing_max": 80 << 30,
    "loads_ram": 12,
    "loads_disk": 34,
    "ram_amplification": 1.02,
    "disk_amplification": 1.253,
    "write_amplification": 0.5,
    "pressure_state": "holding",
    "pressure_headroom": 48 << 20,
    "memory_locked": 1,
    "io_flusher": 0,
    "oom_score_adj_set": 1,
    "realtime": 1,
}
ANSWER = "requested 67108864\nfreed 1048576\nreason the pool holds no more pages\n"


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    """A directory that looks like a mount."""
    control = tmp_path / "control"
    control.mkdir()
    (control / "stat").write_text("".join(f"{key} {value}\n" for key, value in STAT.items()))
    (control / "state").write_text("running\nsignals: psi\n")
    (control / "pool.current").write_text("3145728\n")
    (control / "shrink").write_text(ANSWER)
    return tmp_path


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_numbers_are_read_as_numbers(mount: Path) -> None:
    assert control_io.read_stat(mount) == STAT


def test_the_lines_for_people(mount: Path, capsys: pytest.CaptureFixture[str]) -> None:
    view.print_stat(mount)
    assert lines(capsys) == [
        "RAM saved:   928 KiB: 3.91 MiB of pages swapped out, 3 MiB of RAM in the pool",
        "state:       running",
        "swapped out: 3.91 MiB of 8 GiB",
        "compressed:  1.95 MiB (ratio 2.00), zstd:3",
        "pool:        3 MiB of 64 MiB, peak 5 MiB",
        "backing:     1 MiB of 80 GiB",
        "pages:       700 in RAM, 200 on disk; 110 same-filled, 30 incompressible",
        "density:     space amplification 1.02 in RAM, 1.25 on disk; write amplification",
        "             0.50",
        "pressure:    holding, 48 MiB of headroom",
        "loads:       12 from RAM, 34 from disk",
        "protection:  memory: locked, OOM killer: protected, I/O flusher: no, real-time",
        "             priority: yes",
    ]


def test_a_setting_of_the_kernel_is_shown_while_it_is_not_the_administrators(
    mount: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"min_free_kbytes": 33792, "min_free_kbytes_administrators": 67584}
    same = {"watermark_boost_factor": "-", "watermark_boost_factor_administrators": "-"}
    (mount / "control" / "stat").write_text("".join(f"{key} {value}\n" for key, value in {**STAT, **keys, **same}.items()))
    view.print_stat(mount)
    assert [line for line in lines(capsys) if "kernel" in line] == ["kernel:      vm.min_free_kbytes 33792 (yours: 67584)"]


def change(mount: Path, **figures: int | str) -> None:
    """Have control/stat say `figures`."""
    (mount / "control" / "stat").write_text("".join(f"{key} {value}\n" for key, value in {**STAT, **figures}.items()))


def test_a_protection_that_is_missing_is_said_in_words(mount: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(mount, memory_locked=0, oom_score_adj_set=0, realtime=0)
    view.print_stat(mount)
    said = " ".join(capsys.readouterr().out.partition("protection:")[2].split())
    assert said == "memory: not locked, OOM killer: not protected, I/O flusher: no, real-time priority: no"


def test_no_line_is_longer_than_80_columns(mount: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(mount, version="9.9.9", **{key: 10**19 - 1 for key, value in STAT.items() if isinstance(value, int)})
    (mount / "control" / "state").write_text("degraded: " + "why so many words are needed here " * 10 + "\nsignals: psi\n")
    for in_bytes in (False, True):
        for headings in (False, True):
            view.print_stat(mount, in_bytes, headings)
            assert max(map(len, lines(capsys))) <= 80


def test_a_pool_that_holds_more_than_it_saves_says_so(mount: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(mount, pages_stored=0, pool_current=10 * MIB)
    view.print_stat(mount)
    assert lines(capsys)[0] == "RAM saved:   -10 MiB: 0 B of pages swapped out, 10 MiB of RAM in the pool"


def test_the_version_of_a_daemon_is_shown_where_it_is_another(mount: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(mount, version=__version__)
    view.print_stat(mount)
    assert "version" not in capsys.readouterr().out
    change(mount, version="0.0.9")
    view.print_stat(mount)
    assert lines(capsys)[2] == f"version:     0.0.9; this command is {__version__}: 'tmemfs upgrade' has it take over"


def test_a_daemon_whose_figures_have_older_names_is_shown_without_them(mount: Path, capsys: pytest.CaptureFixture[str]) -> None:
    view.print_stat(mount)
    expected = [line for line in lines(capsys) if not line.startswith("pressure:")]
    older = {"pressure_state": "pressure_zone", "pressure_headroom": "pressure_room"}
    (mount / "control" / "stat").write_text("".join(f"{older.get(key, key)} {value}\n" for key, value in STAT.items()))
    view.print_stat(mount)
    assert lines(capsys) == expected


def test_the_lines_for_people_in_bytes_and_without_headings(mount: Path, capsys: pytest.CaptureFixture[str]) -> None:
    view.print_stat(mount, in_bytes=True, headings=False)
    shown = lines(capsys)
    assert shown[:6] == [
        "950272: 4096000 of pages swapped out, 3145728 of RAM in the pool",
        "running",
        "4096000 of 8589934592",
        "2048000 (ratio 2.00), zstd:3",
        "3145728 of 67108864, peak 5242880",
        "1048576 of 85899345920",
    ]


def test_what_of_the_pool_can_be_had_at_once_is_shown(mount: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(mount, pool_clean=MIB)
    view.print_stat(mount, in_bytes=False)
    assert "pool:        3 MiB of 64 MiB, peak 5 MiB; 1 MiB can be had at once" in lines(capsys)


def test_an_empty_pool_has_no_ratio(mount: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stat = mount / "control" / "stat"
    stat.write_text(stat.read_text().replace("compressed_bytes 2048000", "compressed_bytes 0"))
    view.print_stat(mount)
    assert lines(capsys)[3] == "compressed:  0 B, zstd:3"


def test_json_has_the_state_and_every_figure(mount: Path, capsys: pytest.CaptureFixture[str]) -> None:
    view.print_json(mount)
    assert json.loads(capsys.readouterr().out) == {"state": "running", **STAT}


def test_columns_stand_below_their_names(mount: Path, capsys: pytest.CaptureFixture[str]) -> None:
    view.print_columns(mount, ["pool_current", "codec", "loads_ram"], in_bytes=False, headings=True)
    assert lines(capsys) == [
        "pool_current   codec  loads_ram",
        "       3 MiB  zstd:3         12",
    ]


def test_columns_without_names_are_as_wide_as_their_figures(mount: Path, capsys: pytest.CaptureFixture[str]) -> None:
    view.print_columns(mount, ["loads_disk", "pool_current", "daemon_pid"], in_bytes=True, headings=False)
    assert lines(capsys) == ["34  3145728  4711"]


def test_a_size_without_a_limit_is_shown_as_the_daemon_says_it(mount: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(mount, pressure_ceiling="max", min_free_kbytes="-", compressed_bytes=0)
    view.print_columns(mount, ["pressure_ceiling", "min_free_kbytes", "compressed_bytes"], in_bytes=False, headings=False)
    assert lines(capsys) == ["max  -  0 B"]


@pytest.mark.parametrize("columns", [["pool_current", "nothing", "never"], [""]])
def test_a_column_there_is_none_of_is_refused_with_those_there_are(
    mount: Path, capsys: pytest.CaptureFixture[str], columns: list[str]
) -> None:
    with pytest.raises(BadValue, match=r"no column '.*: 'tmemfs stat --raw' lists all"):
        view.print_columns(mount, columns, in_bytes=False, headings=True)
    assert capsys.readouterr().out == ""


def test_what_a_daemon_says_can_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    regions = Regions.new(slots=64, frames=10, extents=10)
    engine = Engine.over(partial(regions.start, 10, 64), FaultyTier(), parse_codec("lz4"))
    engine.tmem.store(0, [encode(page_of("text", 1), parse_codec("lz4"))])
    outcomes = {"memory_locked": 1, "io_flusher": 1, "oom_score_adj_set": 1, "realtime": 1}
    services = Services(engine, new_limits(engine, 64 * MIB, 10 * MIB), new_pressure(engine), Jobs(), outcomes)
    (tmp_path / "control").mkdir()
    for attribute in ControlDirectory(services).attributes:
        (tmp_path / "control" / attribute.name).write_text(attribute.read())
    view.print_stat(tmp_path)
    assert lines(capsys)[1:3] == ["state:       running", "swapped out: 4 KiB of 256 KiB"]
    assert control_io.read_stat(tmp_path)["version"] == __version__
    assert control_io.read_stat(tmp_path).keys() == units().keys()
    regions.close()


def test_what_to_try_next_names_a_mountpoint_that_is_not_the_usual_one(capsys: pytest.CaptureFixture[str]) -> None:
    view.print_what_next(Path("/run/tmemfs"))
    usual = capsys.readouterr().out
    view.print_what_next(Path("/mnt/other"))
    other = capsys.readouterr().out
    assert "  tmemfs stat\n  tmemfs shrink 64M\n" in usual and "  tmemfs down\n" in usual
    option = "--mountpoint /mnt/other\n"
    assert f"  tmemfs stat {option}  tmemfs shrink 64M {option}" in other and f"  tmemfs down {option}" in other


@pytest.mark.parametrize("key", ["stat", "pool.max"])
def test_a_directory_that_is_no_mount_is_said_with_the_next_step(tmp_path: Path, key: str) -> None:
    with pytest.raises(Refused, match=f"nothing is mounted at {tmp_path}: run 'tmemfs up' or give the mountpoint"):
        control_io.read_control(tmp_path, key)
    with pytest.raises(Refused, match="nothing is mounted"):
        control_io.write_control(tmp_path, key, "1")


def test_an_unknown_file_is_said_with_those_there_are(mount: Path) -> None:
    with pytest.raises(BadValue, match=r"no control file 'pool': choose from pool\.current, shrink, stat, state"):
        control_io.read_control(mount, "pool")


@pytest.mark.parametrize("key", ["", "../swap", "/etc/passwd", "a/b"])
def test_a_name_that_leaves_the_directory_is_refused(mount: Path, key: str) -> None:
    with pytest.raises(BadValue, match=f"is not a control file: see 'ls {mount}/control'"):
        control_io.read_control(mount, key)
    with pytest.raises(BadValue, match="is not a control file"):
        control_io.write_control(mount, key, "1")


def test_an_unknown_file_is_said_with_the_nearest(mount: Path) -> None:
    with pytest.raises(BadValue, match=r"no control file 'pol.current', did you mean pool\.current\?: choose from"):
        control_io.read_control(mount, "pol.current")


def test_a_column_there_is_none_of_is_said_with_the_nearest(mount: Path) -> None:
    with pytest.raises(BadValue, match=r"no column 'pool_curent', did you mean pool_current\?: 'tmemfs stat --raw' lists all"):
        view.print_columns(mount, ["pool_curent"], in_bytes=False, headings=True)


def refusing(patch: pytest.MonkeyPatch, file: Path, number: int, said: str) -> None:
    """A write fails with `number`, and what is read on the same descriptor then is `said`."""
    written: set[int] = set()
    pread = os.pread

    def write(fd: int, data: bytes) -> int:
        written.add(fd)
        raise OSError(number, os.strerror(number))

    patch.setattr(os, "write", write)
    patch.setattr(os, "pread", lambda fd, size, offset: said.encode() if fd in written else pread(fd, size, offset))


@pytest.mark.parametrize("kind", [BadValue, OutOfRange, Busy, Refused, FellShort])
def test_the_daemons_own_reason_reaches_the_user(mount: Path, monkeypatch: pytest.MonkeyPatch, kind: type[TmemfsError]) -> None:
    (mount / "control" / "pool.max").write_text("67108864\n")
    with monkeypatch.context() as patch:
        refusing(patch, mount, errno_of(kind("")), "a pool limit of 1M is too small: give 10 MiB or more\n")
        with pytest.raises(kind) as caught:
            control_io.write_control(mount, "pool.max", "1M")
    assert str(caught.value) == "pool.max: a pool limit of 1M is too small: give 10 MiB or more"


@pytest.mark.parametrize("said", ["67108864\n", "", "\n", "requested 1\nfreed 1\n"])
def test_a_daemon_that_says_no_reason_has_its_errno_explained(mount: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    (mount / "control" / "pool.max").write_text("67108864\n")
    with monkeypatch.context() as patch:
        refusing(patch, mount, errno.EINVAL, said)
        with pytest.raises(BadValue, match=r"'1M' is not a value of pool\.max: see docs/control\.md"):
            control_io.write_control(mount, "pool.max", "1M")


def test_every_setting_is_listed_on_a_line(mount: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (mount / "control" / "codec").write_text("[lz4] zstd none\n")
    view.print_settings(mount)
    assert lines(capsys) == ["codec [lz4] zstd none", "pool.current 3145728", "state running"]


def test_settings_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=f"nothing is mounted at {tmp_path}: run 'tmemfs up' or give the mountpoint"):
        view.print_settings(tmp_path)


SHRUNK = "requested 67108864\nfreed 8388608\nwritten 2097152\npages 5016\nseconds 0.01234\nreason -\n"
COMPACTED = "requested 1.10\nbefore 1.500\nafter 1.099\nframes 3\nsegments 12\nwritten 10485760\nseconds 1.5\nreason -\n"


@pytest.mark.parametrize(("key", "answer"), [("shrink", SHRUNK), ("compact", COMPACTED)])
def test_an_answer_is_in_words_on_a_terminal_and_in_figures_elsewhere(
    mount: Path, monkeypatch: pytest.MonkeyPatch, key: str, answer: str
) -> None:
    words = {
        "shrink": "freed 8 MiB of RAM in 0.01 s: 5016 pages, 2 MiB written to disk\n",
        "compact": "space amplification on disk was 1.500 and is 1.099: 12 segments cleaned, 3 MiB of RAM freed, "
        "10 MiB written in 1.50 s\n",
    }[key]
    (mount / "control" / key).write_text(answer)
    monkeypatch.setattr(view, "write_control", lambda *_: None)

    def shown(stream: io.StringIO, raw: bool) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            view.shrink(mount, "64M", None, raw) if key == "shrink" else view.compact(mount, "1.10", raw=raw)
        return stream.getvalue()

    assert shown(Terminal(), raw=False) == words
    assert shown(Terminal(), raw=True) == answer
    assert shown(io.StringIO(), raw=False) == answer


def test_a_value_is_written_as_a_line(mount: Path) -> None:
    (mount / "control" / "pool.max").write_text("")
    control_io.write_control(mount, "pool.max", "2G")
    assert (mount / "control" / "pool.max").read_text() == "2G\n"


def failing(patch: pytest.MonkeyPatch, number: int) -> None:
    """Every write from now on has errno `number`."""

    def fails(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    patch.setattr(os, "write", fails)


@pytest.mark.parametrize("kind", [BadValue, OutOfRange, Busy, Refused, FellShort])
def test_an_error_crosses_the_control_file_and_stays_what_it_is(
    mount: Path, monkeypatch: pytest.MonkeyPatch, kind: type[TmemfsError]
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, errno_of(kind("")))
        with pytest.raises(kind) as caught:
            control_io.write_control(mount, "shrink", "64M")
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EINVAL, "'64M' is not a value of shrink: see docs/control.md"),
        (errno.ERANGE, "64M is out of range for shrink: it now is requested"),
        (errno.EBUSY, "shrink cannot become 64M now: see"),
        (errno.EAGAIN, "shrink 64M fell short: the reason is in"),
        (errno.EACCES, "shrink cannot be written: see 'ls -l"),
        (errno.EPERM, "shrink cannot be written: see 'ls -l"),
        (errno.ENOTCONN, "the daemon of .* has gone: run 'tmemfs down"),
        (errno.ECONNABORTED, "the daemon of .* has gone: run 'tmemfs down"),
        (errno.EIO, "Input/output error: see 'tmemfs doctor'"),
    ],
)
def test_every_errno_is_said_with_the_next_step(mount: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str) -> None:
    with monkeypatch.context() as patch:
        failing(patch, number)
        with pytest.raises(TmemfsError, match=message):
            control_io.write_control(mount, "shrink", "64M")


def test_an_empty_value_that_may_not_be_written_is_said_so(mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        failing(patch, errno.EACCES)
        with pytest.raises(Refused, match="state cannot be written"):
            control_io.write_control(mount, "state", "")


# `shrink` asks in a thread of its own, to show a bar meanwhile; the files here answer at once.


def asked(patch: pytest.MonkeyPatch, error: TmemfsError | None = None) -> list[str]:
    """What is written to control/shrink, which answers with `error`."""
    values: list[str] = []

    def write(mountpoint: Path, key: str, value: str) -> None:
        assert key == "shrink"
        values.append(value)
        if error:
            raise error

    patch.setattr(view, "write_control", write)
    return values


def test_a_shrink_shows_its_answer(mount: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    values = asked(monkeypatch)
    assert view.shrink(mount, "64M", None) == 0
    assert (values, capsys.readouterr().out) == (["64M"], ANSWER)


def test_a_shrink_that_fell_short_shows_its_answer_too(
    mount: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked(monkeypatch, FellShort("less"))
    with pytest.raises(FellShort):
        view.shrink(mount, "64M", None)
    assert capsys.readouterr().out == ANSWER


def test_a_shrink_that_was_refused_shows_no_old_answer(
    mount: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked(monkeypatch, BadValue("no"))
    with pytest.raises(BadValue):
        view.shrink(mount, "lots", None)
    assert capsys.readouterr().out == ""


def test_a_shrink_where_nothing_is_mounted_asks_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = asked(monkeypatch)
    with pytest.raises(Refused, match="nothing is mounted"):
        view.shrink(tmp_path, "64M", None)
    assert values == []


def deadline_asked(mount: Path, patch: pytest.MonkeyPatch, text: str) -> ShrinkRequest:
    values = asked(patch)
    view.shrink(mount, "64M", parse_seconds(text))
    return ShrinkRequest.parse(values[0])


@pytest.mark.parametrize(("text", "seconds"), [("0", 0.0), ("2", 2.0), ("500ms", 0.5), ("1.5m", 90.0), ("1ms", 0.001)])
def test_a_deadline_is_understood_by_the_daemon(mount: Path, monkeypatch: pytest.MonkeyPatch, text: str, seconds: float) -> None:
    assert deadline_asked(mount, monkeypatch, text) == ShrinkRequest(64 * MIB, seconds)


@pytest.mark.parametrize("text", ["0.05ms", "10000000000000000"])
def test_any_deadline_the_command_takes_is_understood_by_the_daemon(
    mount: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    assert deadline_asked(mount, monkeypatch, text).deadline_s == parse_seconds(text)


class Terminal(io.StringIO):
    """A terminal that keeps what it was sent."""

    def isatty(self) -> bool:
        """It is one."""
        return True


def bar_after(patch: pytest.MonkeyPatch, stream: io.StringIO, seconds: float, *steps: tuple[int, int]) -> str:
    """What a bar writes that is told `steps` when `seconds` have passed."""
    now = [100.0]
    with patch.context() as inner:
        inner.setattr(sys, "stderr", stream)
        inner.setattr(time, "monotonic", lambda: now[0])
        with view.Bar("shrinking") as bar:
            now[0] += seconds
            for left, whole in steps:
                bar.left(left, whole)
    return stream.getvalue()


def test_a_bar_shows_what_is_left_and_wipes_itself_away(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = bar_after(monkeypatch, Terminal(), 2.0, (75 * MIB, 100 * MIB), (0, 100 * MIB))
    first, second, last = shown.split("\r")[1:]
    assert first.startswith("shrinking [########......................] 75 MiB left")
    assert second.startswith(f"shrinking [{'#' * 30}] 0 B left")
    assert last == "\033[K"


def test_a_bar_that_is_told_more_than_all_shows_nothing_done(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"[{'.' * 30}]" in bar_after(monkeypatch, Terminal(), 2.0, (200, 100))


@pytest.mark.parametrize(("seconds", "whole"), [(0.5, 100), (2.0, 0)], ids=["soon", "nothing to do"])
def test_a_bar_is_silent_where_it_would_say_nothing(monkeypatch: pytest.MonkeyPatch, seconds: float, whole: int) -> None:
    assert bar_after(monkeypatch, Terminal(), seconds, (0, whole)) == ""


def test_a_bar_is_silent_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bar_after(monkeypatch, io.StringIO(), 2.0, (50, 100)) == ""


def shown_while(patch: pytest.MonkeyPatch, ask: Callable[[], int]) -> tuple[int, int]:
    """What the bar is told first (left, all) of a request that goes on until then."""
    told: list[tuple[int, int]] = []
    looked = threading.Event()

    def left(bar: view.Bar, left_bytes: int, all_bytes: int) -> None:
        told.append((left_bytes, all_bytes))
        looked.set()

    patch.setattr(view.Bar, "left", left)
    patch.setattr(view, "write_control", lambda mountpoint, key, value: looked.wait(HANG_S))
    ask()
    return told[0]


@pytest.mark.parametrize(("size", "left"), [("1M", MIB), ("all", 3 * MIB), ("64M", 3 * MIB)])
def test_the_bar_of_a_shrink_is_of_what_was_asked_for(mount: Path, monkeypatch: pytest.MonkeyPatch, size: str, left: int) -> None:
    assert shown_while(monkeypatch, lambda: view.shrink(mount, size, None)) == (left, left)


@pytest.mark.parametrize(
    ("factor", "left"), [("1.253", 0), ("1.10", MIB * (1.253 - 1.10) / 1.253), ("2", 0), ("inf", 0), ("nan", 0), ("x", 0)]
)
def test_the_bar_of_a_compaction_is_of_what_is_above_the_factor(
    mount: Path, monkeypatch: pytest.MonkeyPatch, factor: str, left: float
) -> None:
    (mount / "control" / "compact").write_text("after 1.10\n")
    assert shown_while(monkeypatch, lambda: view.compact(mount, factor)) == (int(left), int(left))
