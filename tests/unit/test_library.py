"""pyfuse3 is imported without what only its version needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyfuse3")

#: What importlib.metadata would bring.
NOT_WANTED = {"importlib.metadata", "email", "zipfile", "csv"}


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60).stdout


def test_the_daemon_keeps_nothing_in_memory_for_the_version_of_a_library() -> None:
    loaded = set(run("import sys, tmemfs.supervisor; print(*sys.modules)").split())
    assert "pyfuse3" in loaded
    assert not loaded & NOT_WANTED


def test_the_standard_module_is_there_for_all_others() -> None:
    program = "import tmemfs.fuse.library, importlib.metadata; print(importlib.metadata.version('trio'))"
    assert run(program).split(".")[0].isdigit()


def test_a_standard_module_that_was_imported_before_is_left_alone() -> None:
    program = "import sys, importlib.metadata as real, tmemfs.fuse.library; print(sys.modules['importlib.metadata'] is real)"
    assert run(program).strip() == "True"


def test_a_pyfuse3_that_takes_more_gets_the_standard_module(tmp_path: Path) -> None:
    (tmp_path / "pyfuse3.py").write_text("from importlib.metadata import distributions")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from tmemfs.fuse.library import pyfuse3; print(pyfuse3.__file__)"
    assert run(program).strip() == str(tmp_path / "pyfuse3.py")
