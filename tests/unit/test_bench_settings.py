"""Settings that a benchmark changes: restored at its end, or by the next one after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from tmemfs.errors import Busy, Refused
from tools.bench.settings import Change, Settings

#: A benchmark that changes a setting, and is killed as the crash that it is told.
KILLED = """
import os, signal, sys
from pathlib import Path
from tools.bench import settings
record, file = map(Path, sys.argv[1:3])
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "before it is changed":
    settings.os.fsync = die
with settings.Settings(record) as some:
    some.change([settings.Change(file, "during", "before")])
    die()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    place = tmp_path / "setting"
    place.write_text("before")
    return place


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "record"


def test_a_setting_holds_for_the_block_and_is_restored(file: Path, record: Path) -> None:
    with Settings(record) as settings:
        settings.change([Change(file, "during", "before")])
        assert file.read_text() == "during"
    assert file.read_text() == "before" and not record.exists()


def test_a_setting_is_restored_after_an_error(file: Path, record: Path) -> None:
    with pytest.raises(ZeroDivisionError), Settings(record) as settings:
        settings.change([Change(file, "during", "before")])
        raise ZeroDivisionError
    assert file.read_text() == "before" and not record.exists()


def test_a_setting_that_is_changed_twice_gets_the_value_that_it_had_first(file: Path, record: Path) -> None:
    with Settings(record) as settings:
        settings.change([Change(file, "during", "before")])
        settings.change([Change(file, "later", "during")])
        assert file.read_text() == "later"
    assert file.read_text() == "before"


@pytest.mark.parametrize("moment", ["before it is changed", "after it was changed"])
def test_what_a_benchmark_that_was_killed_left_is_restored_by_the_next(
    file: Path, record: Path, moment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, record, file, moment], check=False, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    assert file.read_text() == ("before" if "before" in moment else "during")
    with Settings(record):
        assert file.read_text() == "before"
    assert "restored what a benchmark that was killed has left: 'before' in" in capsys.readouterr().err
    assert not record.exists()


def test_a_torn_line_of_a_record_is_of_a_change_that_was_not_made(file: Path, record: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("as it was")
    file.write_text("during")
    record.write_text(f'["{file}", "before"]\n["{other}", "torn')
    with Settings(record):
        assert (file.read_text(), other.read_text()) == ("before", "as it was")


def test_two_benchmarks_cannot_change_settings_at_once(file: Path, record: Path) -> None:
    with Settings(record) as settings:
        settings.change([Change(file, "during", "before")])
        with pytest.raises(Busy, match="another benchmark runs"), Settings(record):
            pass
        assert file.read_text() == "during"


def test_a_setting_that_is_gone_is_restored(file: Path, record: Path, tmp_path: Path) -> None:
    gone = tmp_path / "cgroup" / "io.max"
    gone.parent.mkdir()
    with Settings(record) as settings:
        settings.change([Change(gone, "during", "before"), Change(file, "during", "before")])
        gone.unlink()
        gone.parent.rmdir()
    assert file.read_text() == "before" and not record.exists()


def test_what_cannot_be_restored_is_named_and_stays_in_the_record(file: Path, record: Path, tmp_path: Path) -> None:
    stubborn = tmp_path / "stubborn"
    stubborn.touch()
    with pytest.raises(Refused, match=r"could not be restored: 'old' in .*/stubborn"), Settings(record) as settings:
        settings.change([Change(stubborn, "new", "old"), Change(file, "during", "before")])
        stubborn.unlink()
        stubborn.mkdir()
    assert file.read_text() == "before"
    assert recorded(record) == [str(stubborn)]


def recorded(record: Path) -> Sequence[str]:
    """The files in a record."""
    return [line.split('"')[1] for line in record.read_text().splitlines()]


def test_a_signal_waits_for_the_restoration(file: Path, record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(file.read_text()))
    write = Path.write_text

    def interrupted(path: Path, text: str) -> int:
        if text == "before":
            os.kill(os.getpid(), signal.SIGTERM)
        return write(path, text)

    is_over = threading.Event()
    other = threading.Thread(target=is_over.wait)  # the kernel may choose any thread for a signal
    other.start()
    try:
        with Settings(record) as settings:
            settings.change([Change(file, "during", "before")])
            monkeypatch.setattr(Path, "write_text", interrupted)
    finally:
        is_over.set()
        other.join()
        signal.signal(signal.SIGTERM, before)
    assert seen == ["before"]
