"""A benchmark that fails or is interrupted at any step leaves no mount, no loop device, no process and no file behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounted import wait_until
from tmemfs.errors import Refused
from tmemfs.system import swapdev
from tools.bench import mounts
from tools.bench.mounts import mounted, processes_with, take_down

pytestmark = pytest.mark.fuse

#: `python -m tools.bench`, of which only the steps on a mount are run, on a small pool.
BENCH = """
import sys
from tools.bench import __main__ as bench, page_path
page_path.measure = lambda rounds: {}
bench.use_memory = lambda size: None
bench.POOL_BYTES = 64 << 20
FAULT
sys.argv[1:] = ["--quick", "--directory", DIRECTORY, "--output", DIRECTORY + "/out"]
sys.exit(bench.main())
"""


def assert_nothing_left(directory: Path) -> None:
    """No file below `directory`, and nothing of the machine that knows of it."""
    attached = [file.read_bytes() for file in swapdev.SYS_BLOCK.glob("loop*/loop/backing_file")]
    assert not [name for name in attached if os.fsencode(directory) in name]
    assert os.fsencode(directory) not in Path("/proc/self/mounts").read_bytes()
    assert not [pid for pid in processes_below(directory) if pid != os.getpid()]
    assert list(directory.iterdir()) == []


def processes_below(directory: Path) -> list[int]:
    """Processes that have a path below `directory` in their command line."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                words = (place / "cmdline").read_bytes()
            except OSError:
                continue
            found += [int(place.name)] if os.fsencode(directory) + b"/" in words else []
    return found


def started(directory: Path, fault: str = "") -> subprocess.Popen[str]:
    """A benchmark below `directory`. The signals have their defaults, whatever the caller of the tests ignores."""
    script = BENCH.replace("FAULT", fault).replace("DIRECTORY", repr(str(directory)))
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("from tools.bench import core; core._fio = lambda directory: 1 / 0", "ZeroDivisionError"),
        ("from tools.bench import core; core.fill = lambda *_: 1 / 0", "ZeroDivisionError"),
        ("from tmemfs.system import swapdev; swapdev.attach = lambda image: 1 / 0", "ZeroDivisionError"),
        ("from tools.bench import mounts; mounts._COMMAND = (*mounts._COMMAND[:2], 'nowhere')", "CalledProcessError"),
    ],
)
def test_a_step_that_fails_leaves_nothing_behind(tmp_path: Path, fault: str, says: str) -> None:
    if "nowhere" in fault:  # the mount fails, and what takes it down is another command
        fault += "; mounts.take_down = lambda mountpoint: None"
    with started(tmp_path, fault) as bench:
        _, said = bench.communicate(timeout=100)
    assert bench.returncode == 1 and says in said, said
    assert_nothing_left(tmp_path)


def test_a_benchmark_that_is_not_run_by_root_is_refused_in_a_line(tmp_path: Path) -> None:
    with started(tmp_path, "from tmemfs.system import capabilities; capabilities.is_root = lambda: False") as bench:
        _, said = bench.communicate(timeout=100)
    assert (bench.returncode, said) == (2, "bench: mounting and swapping need root: run it with sudo\n")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("is_mounted", [False, True], ids=["while it is mounted", "while it measures"])
def test_a_benchmark_that_is_interrupted_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, is_mounted: bool) -> None:
    with started(tmp_path, "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)") as bench:
        if is_mounted:
            wait_until(lambda: os.fsencode(tmp_path) in Path("/proc/self/mounts").read_bytes(), 60)
        else:
            wait_until(lambda: len(processes_below(tmp_path)) > 0, 60)
        os.kill(bench.pid, number)
        _, said = bench.communicate(timeout=100)
    assert bench.returncode == 128 + number and f"{number.name}: taking everything down" in said, said
    assert_nothing_left(tmp_path)


def test_a_mount_whose_device_cannot_be_attached_is_taken_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(image: Path) -> str:
        raise Refused("no loop device is free")

    monkeypatch.setattr(swapdev, "attach", refuses)
    with pytest.raises(Refused), mounted(tmp_path, "one", "--size", "64M"):
        pass
    assert not swapdev.is_mounted(tmp_path / "one") and processes_with(str(tmp_path / "one")) == ()


def test_what_cannot_be_taken_down_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mounts, "_DOWN_S", 0.0)
    monkeypatch.setattr(mounts, "_COMMAND", ("sh", "-c", "echo it will not >&2; exit 2"))
    take_down(tmp_path / "one")
    assert capsys.readouterr().err == f"bench: {tmp_path / 'one'} is left behind: it will not\n"
