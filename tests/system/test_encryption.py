"""What a thief of the disk, of a copy of the backing or of a core file finds of pages that were swapped out."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.mappings import flags_of
from tests.mounted import Place, mounted, swap_up, tmemfs
from tests.system.test_backing_device import remove_loop_device
from tests.system.test_swap import limited, shrink_now
from tests.waiting import readable, wait_until
from tmemfs.system import swapdev
from tmemfs.tiers.file import MAGIC
from tmemfs.units import MIB, PAGE_BYTES
from tools.cgroup import MemoryCgroup

pytestmark = pytest.mark.system

#: Begins each page of the program below, whose pages do not compress: in the backing they lie as they are.
MARKER: Final = bytes.fromhex("5ca1ab1e") + b"a secret of a program, in each of its pages"
PAGES: Final = 24_000
#: Enters the cgroup, fills its pages, says so, and verifies them for each line that it is told.
PROGRAM: Final = """
import mmap, sys
from pathlib import Path
from random import Random
tasks, count, marker = sys.argv[1], int(sys.argv[2]), bytes.fromhex(sys.argv[3])
Path(tasks).write_text("0")
memory = mmap.mmap(-1, count * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
def page(number):
    return marker + Random(number).randbytes(4096 - len(marker))
for number in range(count):
    memory[number * 4096 : (number + 1) * 4096] = page(number)
print("filled", flush=True)
for line in sys.stdin:
    print(sum(memory[n * 4096 : (n + 1) * 4096] != page(n) for n in range(count)), flush=True)
"""
#: Runs a command, if one is given, and reads from address 0 once its input ends. A signal that is sent would be ignored.
CRASHING: Final = """
import ctypes, sys, threading
from tmemfs.cli import main
thread = threading.Thread(target=lambda: (sys.stdin.read(), ctypes.string_at(0)), daemon=True)
thread.start()
sys.exit(main(sys.argv[1:])) if sys.argv[1:] else thread.join()
"""


@contextmanager
def marked(cgroup: MemoryCgroup) -> Iterator[subprocess.Popen[str]]:
    """A program in `cgroup` that has filled its pages. It is killed at the end, without touching them."""
    command = [sys.executable, "-c", PROGRAM, str(cgroup.tasks), str(PAGES), MARKER.hex()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "filled\n"
            yield process
        finally:
            process.kill()


def wrong_pages(process: subprocess.Popen[str]) -> int:
    assert process.stdin is not None and process.stdout is not None
    print("verify", file=process.stdin, flush=True)
    return int(process.stdout.readline())


def markers_in(backing: Path) -> int:
    """Markers in the whole of a backing, whatever the records are."""
    with backing.open("rb") as file:
        found, before = 0, b""
        while data := file.read(8 * MIB):
            found += (before + data).count(MARKER)
            before = data[1 - len(MARKER) :]
    return found


def kill(place: Place) -> None:
    """Kill the daemon, and wait until it is gone."""
    ended = os.pidfd_open(place.pid)
    os.kill(place.pid, signal.SIGKILL)
    readable(ended)
    os.close(ended)


@pytest.mark.parametrize("encrypt", ["on", "off"])
def test_pages_are_found_in_the_backing_only_without_encryption(tmp_path: Path, encrypt: str) -> None:
    with swap_up(tmp_path, "--encrypt", encrypt, size="1G", pool_max="32M") as place, limited("marked", "32M") as cgroup:
        with marked(cgroup) as program:
            shrink_now(place, "all")
            assert place.number("pages_on_disk") > PAGES // 2
            assert place.number("backing_encrypted") == (encrypt == "on")
            assert place.backing.stat().st_mode & 0o777 == 0o600
            assert place.backing.read_bytes().startswith(MAGIC)
            found = markers_in(place.backing)
            assert not found if encrypt == "on" else found > PAGES // 2
            assert wrong_pages(program) == 0
            shrink_now(place, "all")
            on_disk = place.number("pages_on_disk")
            kill(place)
            # what a crash leaves is there until the next start
            assert place.backing.stat().st_blocks * 512 > on_disk * 4096
            found = markers_in(place.backing)
            assert not found if encrypt == "on" else found > PAGES // 2
        tmemfs("down", place.mountpoint)
        assert not swapdev.swap_entries()


def test_nothing_of_the_pages_is_left_on_a_disk_that_cannot_discard(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(256 * MIB)
    device = swapdev.attach(disk)
    Path("/sys/block", Path(device).name, "queue/discard_max_bytes").write_text("0")
    try:
        with swap_up(tmp_path, "--backing", device, size="1G", pool_max="32M") as place, limited("marked", "32M") as cgroup:
            with marked(cgroup) as program:
                shrink_now(place, "all")
                assert place.number("pages_on_disk") > PAGES // 2
                assert not markers_in(disk) and wrong_pages(program) == 0
                written = place.number("pages_written") * PAGE_BYTES
            tmemfs("down", place.mountpoint)
        # all of it is still there
        assert disk.stat().st_blocks * 512 > written // 2 and not markers_in(disk)
    finally:
        swapdev.detach(device)
        remove_loop_device(int(Path(device).name.removeprefix("loop")))


def test_the_key_and_the_pages_are_locked_and_left_out_of_core_files(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        assert place.number("core_dumps_off") == place.number("memory_locked") == 1
        flags = {name: flags_of(f"/memfd:tmemfs-{name}", place.pid) for name in ("key", "slots", "segments", "arena")}
        assert all(flags.values())
        assert all({"lo", "dd"} <= one for found in flags.values() for one in found), flags


def dumps_core(arguments: Sequence[str], directory: Path, is_ready: Callable[[], object]) -> bool:
    """Whether a tmemfs that is called with `arguments` in `directory` writes a core file when it crashes."""
    with subprocess.Popen([sys.executable, "-c", CRASHING, *arguments], cwd=directory, stdin=subprocess.PIPE) as process:
        try:
            wait_until(is_ready)
            resource.prlimit(process.pid, resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert process.stdin is not None
            process.stdin.close()
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        finally:
            process.kill()
    assert ended is not None and ended.si_status == signal.SIGSEGV
    return ended.si_code == os.CLD_DUMPED


def test_a_daemon_that_crashes_writes_no_core_file(tmp_path: Path) -> None:
    if not dumps_core([], tmp_path, lambda: True):
        pytest.skip("this machine writes no core files")
    place = Place(tmp_path)
    place.mountpoint.mkdir()
    command = ["mount", *map(str, place.options), "--size", "64M", "--foreground"]
    try:
        assert not dumps_core(command, tmp_path, lambda: swapdev.is_mounted(place.mountpoint) and place.state == "running")
    finally:
        place.end()
