"""A cgroup for a hog is removed if it cannot be made as it was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import cgroup
from tools.cgroup import MemoryCgroup


def test_a_cgroup_whose_limit_cannot_be_set_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.limit_in_bytes").touch()
    monkeypatch.setattr(cgroup, "_V1", tmp_path)
    made = MemoryCgroup("test", 1 << 20)

    def refuses(path: Path, text: str) -> int:
        assert path.parent == made.path and made.path.is_dir()
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "write_text", refuses)
    with pytest.raises(OSError, match="Device or resource busy"), made:
        pass
    assert not made.path.exists()
