"""What each kind of test needs of the machine: skipped with the reason where it is missing, failed where it is required.

TMEMFS_REQUIRE=fuse,system,compiled turns those skips into failures, as CI does.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import settings

from tests.signals import usual_signals
from tmemfs.errors import Refused
from tmemfs.store import native as hot
from tmemfs.store.region import Region
from tmemfs.system.kernel_settings import KernelSettings
from tmemfs.system.ownership import refuse_ram
from tools.cgroup import memory_controller

settings.register_profile("tmemfs", deadline=None, print_blob=True)
settings.load_profile("tmemfs")


def pytest_configure() -> None:
    """Temporary files go to a disk: where /tmp is in RAM, no backing may lie there."""
    place = os.open(tempfile.gettempdir(), os.O_PATH)
    try:
        refuse_ram(Path(tempfile.gettempdir()), place, "--basetemp")
    except Refused:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/var/tmp")
    finally:
        os.close(place)


@pytest.fixture(scope="session", autouse=True)
def signals() -> Iterator[None]:
    """None ignored or blocked, whatever the caller of the tests does with them."""
    with usual_signals():
        yield


@pytest.fixture(autouse=True)
def descriptors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close the regions that a test leaves: an ordinary limit is 1024 descriptors, and there are more tests than that."""
    opened = set[int]()  # not the regions, whose mappings would stay
    make, close = Region.__init__, Region.close

    def noted(region: Region, name: str, size_bytes: int) -> None:
        make(region, name, size_bytes)
        opened.add(region.fd)

    def forgotten(region: Region) -> None:
        close(region)
        opened.discard(region.fd)

    monkeypatch.setattr(Region, "__init__", noted)
    monkeypatch.setattr(Region, "close", forgotten)
    yield
    for descriptor in opened:
        os.close(descriptor)


@pytest.fixture(scope="session", autouse=True)
def kernel_settings() -> Iterator[None]:
    """No daemon leaves the kernel's settings changed, however it ended."""
    yield
    with suppress(PermissionError), closing(KernelSettings()) as settings:
        found = settings.findings()
        assert found.is_in_use or not found.changed, f"left changed: {found.changed}"


def _missing_for_fuse() -> str | None:
    if os.geteuid():
        return "needs root"
    return None if Path("/dev/fuse").exists() else "needs /dev/fuse: modprobe fuse"


def _missing_for_system() -> str | None:
    if missing := _missing_for_fuse():
        return missing
    if not Path("/dev/loop-control").exists():
        return "needs loop devices: modprobe loop"
    if memory_controller() is None:
        return "needs a memory cgroup controller"
    absent = [name for name in ("losetup", "mkswap", "swapon", "swapoff", "fio", "stress-ng") if not shutil.which(name)]
    return f"needs {' '.join(absent)}: make setup" if absent else None


def _missing_for_compiled() -> str | None:
    return f"needs the compiled store ({hot.WHY_NOT}): make setup" if hot.WHY_NOT else None


_NEEDS = {"fuse": _missing_for_fuse, "system": _missing_for_system, "compiled": _missing_for_compiled}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip or fail what cannot run here."""
    required = os.environ.get("TMEMFS_REQUIRE", "").split(",")
    for kind, missing_for in _NEEDS.items():
        if item.get_closest_marker(kind) and (missing := missing_for()):
            if kind in required:
                pytest.fail(f"{kind} tests are required here, but: {missing}", pytrace=False)
            pytest.skip(missing)
