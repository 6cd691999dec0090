"""Every test here leaves the machine as it found it, or fails."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.waiting import HANG_S
from tools.leftovers import Machine


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No swap, loop device, mount, cgroup or process of the test, and the kernel's settings as before."""
    machine = Machine(tmp_path_factory.getbasetemp().resolve(), os.getpid())
    before = machine.settings()
    yield
    left = machine.wait(before, HANG_S / 8)
    assert not left, left
