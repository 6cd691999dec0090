"""Signals of memory pressure: descriptors are let go of where not all of them can be opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tmemfs.system import pressure_signals
from tmemfs.system.pressure_signals import CgroupLimit, PressureSignals


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_cgroup_without_all_of_its_files_keeps_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.high").write_text("max\n")
    before = descriptors()
    with pytest.raises(FileNotFoundError):
        CgroupLimit(tmp_path, is_v1=False)
    assert descriptors() == before


def test_signals_that_cannot_be_opened_keep_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[CgroupLimit]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(pressure_signals, "_own_limits", fail)
    before = descriptors()
    with pytest.raises(OSError, match="Too many"):
        PressureSignals()
    assert descriptors() == before


def test_a_cgroup_whose_limit_cannot_be_read_keeps_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was removed just now."""
    monkeypatch.setattr(pressure_signals, "_V2", tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    for name in ("memory.max", "memory.high", "memory.current", "memory.stat"):
        (own / name).write_text("gone\n")
    before = descriptors()
    assert pressure_signals._limits_above(own, is_v1=False) == []
    assert descriptors() == before


def test_a_trigger_that_cannot_be_polled_keeps_no_descriptor(tmp_path: Path) -> None:
    file = tmp_path / "memory.pressure"  # which epoll refuses, as it does every plain file
    file.touch()
    before = descriptors()
    with pytest.raises(PermissionError):
        pressure_signals.Stalls(file)
    assert descriptors() == before
