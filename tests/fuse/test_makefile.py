"""`make clean` and `make down` beside a mount, in a copy of the checkout that has no virtual environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounted import mounted
from tmemfs.system import swapdev

pytestmark = [pytest.mark.fuse, pytest.mark.skipif(not shutil.which("make"), reason="needs make: apt-get install make")]

ROOT = Path(__file__).parents[2]


def make(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run make; Python has its standard library only."""
    words = ("make", f"PYTHON={sys.executable} -S", *words)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that are needed, and one that `make clean` removes."""
    place = tmp_path / "checkout"
    shutil.copytree(ROOT / "tmemfs", place / "tmemfs", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (place / "tools").mkdir()
    (place / "build").mkdir()
    for name in ("Makefile", "tools/in_use.py"):
        shutil.copy(ROOT / name, place / name)
    return place


def test_clean_refuses_while_something_is_mounted_and_down_needs_no_virtual_environment(tmp_path: Path, checkout: Path) -> None:
    (tmp_path / "one").mkdir()
    with mounted(tmp_path / "one") as place:
        done = make(checkout, "clean")
        assert done.returncode == 2 and f"clean: {place.mountpoint} is mounted: run 'sudo make down' first" in done.stderr
        assert (checkout / "build").exists()
        done = make(checkout, "down", f"ARGS={place.mountpoint}")
        assert (done.returncode, done.stdout) == (0, f"{place.mountpoint}: down\n"), done.stderr
        assert not swapdev.is_mounted(place.mountpoint)
