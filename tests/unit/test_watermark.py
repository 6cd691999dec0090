"""The minimum watermark: lowered by share of what it was, restored, not boosted meanwhile, left alone without the right."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tmemfs.host.watermark import MinimumWatermark, no_boost


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Like min_free_kbytes."""
    file = tmp_path / "min_free_kbytes"
    file.write_text("9999\n")
    return file


def test_it_is_lowered_by_shares_of_what_it_was_and_restored(file: Path) -> None:
    watermark = MinimumWatermark(file)
    watermark.restore()
    assert file.read_text() == "9999\n"
    for share, text in ((3 / 4, "7499\n"), (1 / 2, "4999\n")):
        watermark.lower(share)
        assert file.read_text()[:4] == text[:4]
    watermark.restore()
    assert file.read_text() == "9999\n"


def test_the_next_time_it_is_what_an_administrator_made_of_it(file: Path) -> None:
    watermark = MinimumWatermark(file)
    watermark.lower(1 / 2)
    watermark.restore()
    file.write_text("8000\n")
    watermark.lower(1 / 2)
    assert file.read_text()[:4] == "4000"
    watermark.close()
    assert file.read_text() == "8000\n"


def test_without_the_right_nothing_is_changed(tmp_path: Path) -> None:
    watermark = MinimumWatermark(tmp_path / "none")
    assert not watermark.lower(1 / 2)
    watermark.restore()
    watermark.close()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_restored_is_tried_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watermark = MinimumWatermark(file)
    assert watermark.lower(1 / 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _fails)
        watermark.restore()
    assert file.read_text()[:4] == "4999"
    watermark.restore()
    assert file.read_text() == "9999\n"


def test_what_cannot_be_lowered_is_not_restored(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watermark = MinimumWatermark(file)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _fails)
        assert not watermark.lower(1 / 2)
    file.write_text("8000\n")
    watermark.restore()
    assert file.read_text() == "8000\n"


@pytest.mark.parametrize("usual", ["15000\n", "0\n"])
def test_boosting_is_off_inside_and_as_it_was_afterwards(file: Path, usual: str) -> None:
    file.write_text(usual)
    with no_boost(file) as is_off:
        assert is_off and file.read_text().strip() == "0"
    assert file.read_text().strip() == usual.strip()


def test_what_an_administrator_makes_of_boosting_meanwhile_stays(file: Path) -> None:
    file.write_text("15000\n")
    with no_boost(file):
        file.write_text("300\n")
    assert file.read_text() == "300\n"


def test_boosting_is_on_again_after_an_error(file: Path) -> None:
    with pytest.raises(RuntimeError), no_boost(file):
        raise RuntimeError
    assert file.read_text().strip() == "9999"


def test_boosting_that_cannot_be_turned_off_is_said_to_be_on(tmp_path: Path) -> None:
    with no_boost(tmp_path / "none") as is_off:
        assert not is_off
    assert list(tmp_path.iterdir()) == []


def _fails(*_: object) -> int:
    raise PermissionError
