"""`make up` puts the command on PATH, and `make down` takes away what it put there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make: apt-get install make")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile, and a command in the virtual environment that does nothing; it fails where `refuses` exists."""
    place = tmp_path / "check out"
    (place / ".venv/bin").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", place)
    for name in ("pyproject.toml", "tools/setup.sh", "tmemfs/store/compiled.pyx", "tmemfs/store/constants.pxi"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).touch()
    command = place / ".venv/bin/tmemfs"
    command.write_text('#!/bin/sh\n[ "$1" = --version ] || [ ! -e refuses ]\n')
    command.chmod(0o755)
    (place / ".venv/.installed").touch()
    return place


def make(checkout: Path, target: str) -> int:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(["make", target, "LINK=../tmemfs"], cwd=checkout, env=environment, timeout=100, check=False).returncode


def test_up_puts_the_command_on_path_and_down_takes_it_away(checkout: Path) -> None:
    link = checkout.parent / "tmemfs"
    assert make(checkout, "up") == make(checkout, "up") == 0
    assert link.resolve() == checkout / ".venv/bin/tmemfs"
    assert make(checkout, "down") == 0
    assert not link.is_symlink()


def test_a_program_of_that_name_is_left_alone(checkout: Path) -> None:
    link = checkout.parent / "tmemfs"
    link.write_text("another program")
    assert make(checkout, "up") == make(checkout, "down") == 0
    assert link.read_text() == "another program"


def test_a_down_that_is_refused_leaves_the_command_on_path(checkout: Path) -> None:
    assert make(checkout, "up") == 0
    (checkout / "refuses").touch()
    assert make(checkout, "down") != 0
    assert (checkout.parent / "tmemfs").exists()


def test_a_link_to_a_checkout_that_has_gone_is_replaced(checkout: Path) -> None:
    link = checkout.parent / "tmemfs"
    link.symlink_to(checkout / "gone")
    assert make(checkout, "up") == 0
    assert link.resolve() == checkout / ".venv/bin/tmemfs"
