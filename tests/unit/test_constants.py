"""The constants of compiled.pyx are generated from the modules in Python; a module that was built from others is not used."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tmemfs.store import constants

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tmemfs" / "store" / "compiled.pyx"


def test_the_checked_in_file_is_what_is_generated() -> None:
    assert constants.PATH.read_text() == constants.text(), "run: python -m tmemfs.store.constants"


def test_every_constant_is_used() -> None:
    names = re.findall(r"^(?:    |cdef \w+ )(\w+) =", constants.text(), re.MULTILINE)
    assert len(names) > 20 and all(re.search(rf"\b{name}\b", SOURCE.read_text()) for name in names)


def test_compiled_code_has_no_layout_of_its_own() -> None:
    """Shifts, masks and sizes have names; what is left are small counts."""
    code = re.sub(r'""".*?"""|#.*|"[^"]*"', "", SOURCE.read_text(), flags=re.DOTALL)
    assert {int(number, 0) for number in re.findall(r"\b(?:0x)?\d+\b", code)} <= {0, 1, 2, 8}


@pytest.mark.compiled
@pytest.mark.parametrize("other", ["units.BLOCK_BYTES = 512", "record.SEGMENT_SHIFT = 33", "codec.LARGEST_COMPRESSED_BYTES = 3901"])
def test_a_module_built_from_other_constants_is_not_used(other: str) -> None:
    program = f"""
from tmemfs import units
from tmemfs.store import codec, record
{other}
from tmemfs.store import native
print(native.IS_COMPILED, native.WHY_NOT)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert child.stdout.startswith("False compiled from another version of tmemfs"), child.stdout
