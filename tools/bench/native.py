"""C programs of this repository, compiled into build/native/ when their source is newer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

from tmemfs.errors import Refused

_TOOLS: Final = Path(__file__).resolve().parent.parent
FLOOR: Final = _TOOLS / "floor" / "floor.c"
TOUCHER: Final = _TOOLS / "bench" / "toucher.c"
_PLACE: Final = _TOOLS.parent / "build" / "native"
_FLAGS: Final = ("-O2", "-Wall", "-Wextra", "-Wno-missing-field-initializers")


def compiled(source: Path) -> Path:
    """The compiled program of `source`. Raises Refused."""
    program = _PLACE / source.stem
    if program.exists() and program.stat().st_mtime >= source.stat().st_mtime:
        return program
    _PLACE.mkdir(parents=True, exist_ok=True)
    fresh = program.with_suffix(f".{os.getpid()}")
    try:
        done = subprocess.run(["gcc", *_FLAGS, "-o", fresh, source, "-lm"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Refused("gcc is not installed: run 'sudo make setup'") from None
    if done.returncode:
        raise Refused(f"gcc {source} failed: {done.stderr.strip()}")
    fresh.replace(program)
    return program
