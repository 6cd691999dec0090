"""What takes long ends when nobody waits for it any more: a signal to the process that writes the control file, or a deadline."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mounted import TMEMFS, Place, mounted, wait_until
from tests.parts import page_of
from tests.waiting import HANG_S
from tmemfs.units import PAGE_BYTES

pytestmark = pytest.mark.fuse

#: Writes one value with one write(2), as `echo` does, and dies of SIGINT as a shell's child does.
WRITER = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
fd = os.open(sys.argv[1], os.O_WRONLY)
print("writing", flush=True)
os.write(fd, sys.argv[2].encode())
"""
_SEGMENTS = 96
_FULL = 255


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A mount with a backing in each segment of which a few pages have died: there is much to clean, for little."""
    with mounted(tmp_path, "--codec", "none", pool_max="24M") as place:
        place.write("pressure.mode", "off")
        place.write("clean.daily", "0")
        fd = os.open(place.image, os.O_RDWR)
        try:
            pages = b"".join(page_of("raw", seed) for seed in range(60))
            for first in range(0, _SEGMENTS * _FULL, 60):
                os.pwrite(fd, pages, first * PAGE_BYTES)
            place.write("shrink", "all")
            for first in range(0, _SEGMENTS * _FULL, 16):
                os.pwrite(fd, bytes(PAGE_BYTES), first * PAGE_BYTES)
        finally:
            os.close(fd)
        place.write("clean.daily", "max")
        yield place


@contextmanager
def writing(place: Place, name: str, value: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is about to write `value`, or does."""
    path = place.mountpoint / "control" / name
    with subprocess.Popen([sys.executable, "-c", WRITER, path, value], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
        yield writer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_writer_ends_a_compaction_which_says_how_far_it_came(place: Place, number: signal.Signals) -> None:
    before = float(place.flat()["disk_amplification"])
    with writing(place, "compact", "1.0001") as writer:
        wait_until(lambda: place.number("cleanings") > 0)
        writer.send_signal(number)
        assert writer.wait(HANG_S) == -number
    wait_until(lambda: place.flat("compact")["reason"] == "interrupted")
    assert 1.0001 < float(place.flat("compact")["after"]) < before
    cleanings = place.number("cleanings")
    assert place.state == "running"
    assert place.number("cleanings") == cleanings


def test_a_deadline_ends_a_compaction(place: Place) -> None:
    with pytest.raises(BlockingIOError):
        place.write("compact", "1.0001 deadline=200ms")
    assert place.flat("compact")["reason"] == "the deadline passed"


def test_the_command_says_how_far_it_came_when_it_is_interrupted(place: Place) -> None:
    command = [*TMEMFS, "compact", "1.0001", "--mountpoint", str(place.mountpoint)]
    compact = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: place.number("cleanings") > 0)
    compact.send_signal(signal.SIGINT)
    out, errors = compact.communicate(timeout=HANG_S)
    assert (compact.returncode, "reason interrupted" in out, "Traceback" in errors) == (1, True, False), errors


def test_a_deadline_may_be_given_to_the_command(place: Place) -> None:
    command = [*TMEMFS, "compact", "1.0001", "--deadline", "200ms", "--mountpoint", str(place.mountpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG_S)
    assert done.returncode == 1 and "reason the deadline passed" in done.stdout
