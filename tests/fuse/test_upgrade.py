"""`tmemfs upgrade`: another version takes over while the image is read and written, or cannot, and the one before serves on."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.mounted import Place, mounted, tmemfs
from tests.other_version import OtherVersion, ended
from tests.waiting import HANG_S, wait_until
from tmemfs import __version__
from tmemfs.holdings import LAYOUT
from tmemfs.system import runtime
from tmemfs.system.status_region import State, StatusRegion, Word
from tmemfs.units import PAGE_BYTES

pytestmark = pytest.mark.fuse

#: Pages that are written and read all the time. More than the pool holds.
PAGES = 9_000
NEXT = "9.9.9"


class Verifying:
    """Writes pages and reads them back, in a thread, until the block ends; a wrong byte or an error fails the test."""

    def __init__(self, image: int) -> None:
        self._image = image
        self._chance = random.Random(7)
        self._versions = dict.fromkeys(range(PAGES), 0)
        self._end = threading.Event()
        self.done = 0
        self.failures: list[str] = []
        for page in range(PAGES):
            self._write(page)

    def run(self) -> None:
        """Until `stop`."""
        try:
            while not self._end.is_set():
                page = self._chance.randrange(PAGES)
                self._versions[page] += 1
                self._write(page)
                self.verify(self._chance.randrange(PAGES))
                self.done += 1
        except OSError as error:
            self.failures.append(str(error))

    def verify(self, page: int) -> None:
        """Read a page, and compare it."""
        found = os.pread(self._image, PAGE_BYTES, page * PAGE_BYTES)
        if found != self._content(page):
            self.failures.append(f"page {page} of version {self._versions[page]} is wrong")

    def stop(self) -> None:
        """End the thread."""
        self._end.set()

    def verify_all(self) -> None:
        """Verify every page."""
        for page in range(PAGES):
            self.verify(page)

    def _write(self, page: int) -> None:
        os.pwrite(self._image, self._content(page), page * PAGE_BYTES)

    def _content(self, page: int) -> bytes:
        """Half of it does not compress."""
        seed = random.Random(page << 32 | self._versions[page])
        return seed.randbytes(PAGE_BYTES // 2) + f"{page} {self._versions[page]} ".encode().ljust(PAGE_BYTES // 2, b".")


@contextmanager
def verifying(place: Place) -> Iterator[Verifying]:
    """Everything is verified at the end, and while the block lasts."""
    image = os.open(place.image, os.O_RDWR)
    try:
        load = Verifying(image)
        thread = threading.Thread(target=load.run)
        thread.start()
        try:
            yield load
            before = load.done
            wait_until(lambda: load.done > before + 100 or load.failures)  # what serves at the end of the block, does
        finally:
            load.stop()
            thread.join()
        load.verify_all()
        assert not load.failures, load.failures
    finally:
        os.close(image)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with mounted(tmp_path, size="64M", pool_max="16M") as place:
        yield place


@pytest.fixture
def other(tmp_path: Path) -> OtherVersion:
    return OtherVersion.copy(tmp_path / "other").change("__init__", __version__, NEXT)


def figures(place: Place) -> tuple[str, int, int]:
    """Version, daemon and upgrades, as stat has them."""
    stat = place.flat()
    return stat["version"], int(stat["daemon_pid"]), int(stat["upgrades"])


def test_another_version_takes_over_and_serves_what_was_stored(place: Place, other: OtherVersion) -> None:
    pid = place.pid
    with verifying(place):
        assert place.number("pages_on_disk") > 0 < place.number("pages_in_ram")
        assert other.upgrade(place.mountpoint) == (0, f"{place.mountpoint}: version {__version__} has handed over to {NEXT}\n")
        version, now, upgrades = figures(place)
        assert (version, upgrades) == (NEXT, 1) and now != pid
        assert runtime.process_started(pid) is None
        record = runtime.read_record(place.mountpoint)
        assert record is not None and record.daemon_lives and (record.pid, record.version) == (now, NEXT)
        assert record.options["backing"] == str(place.backing)
    flat = place.flat()
    assert flat["worker_generation"] == "2" and flat["worker_killed"] == flat["worker_crashed"] == "0"
    assert {place.flat("events")[key] for key in ("corrupt_records", "read_errors", "write_errors")} == {"0"}
    assert f"version {__version__} has handed over to {NEXT}" in place.log.read_text()
    tmemfs("umount", place.mountpoint)
    assert runtime.process_started(now) is None and runtime.read_record(place.mountpoint) is None
    assert place.backing.stat().st_size == PAGE_BYTES
    assert not runtime.status_path(place.mountpoint).exists() and not runtime.upgrade_path(place.mountpoint).exists()


def test_upgrades_follow_each_other(place: Place) -> None:
    daemons = {place.pid}
    with verifying(place):
        for count in range(1, 4):
            tmemfs("upgrade", place.mountpoint)
            assert figures(place)[2] == count
            daemons.add(place.pid)
    assert len(daemons) == 4


BAD = {
    "has a syntax error": ("worker", "from __future__ import annotations\n", "from __future__ import\n", "SyntaxError"),
    "lacks a package": ("manifest", "import mmap\n", "import no_such_package\n", "No module named 'no_such_package'"),
    "has another layout": (
        "holdings",
        f"LAYOUT: Final = {LAYOUT}\n",
        "LAYOUT: Final = 99\n",
        "version 9.9.9 has layout 99 of the regions",
    ),
    "ends at once": ("candidate", "    status = 1\n", "    os._exit(3)\n", "the new version has ended"),
    "has another size of a region": ("holdings", "self.slots * SLOT_BYTES", "self.slots * 9", "another size of the region slots"),
    "ends when it is to serve": ("candidate", "    memory.outlive_parent()\n", "    os._exit(3)\n", "the new version has ended"),
    "has a worker that ends": (
        "worker",
        "    signals = SignalInbox()\n",
        "    raise Refused('ours')\n",
        "its worker ended with 1: ours",
    ),
    "has a worker that is killed": (
        "worker",
        "        self._is_ready = True  #",
        "        os.kill(os.getpid(), 9)\n        self._is_ready = True  #",
        "its worker was ended by SIGKILL",
    ),
}


@pytest.mark.parametrize("how", BAD)
def test_a_version_that_cannot_take_over_leaves_the_one_before_serving(place: Place, other: OtherVersion, how: str) -> None:
    module, old, new, why = BAD[how]
    other.change(module, old, new)
    before = figures(place)
    with verifying(place):
        code, said = other.upgrade(place.mountpoint)
        assert code == 2 and why in said and "serves" in said, said
        assert figures(place) == before
        record = runtime.read_record(place.mountpoint)
        assert record is not None and (record.pid, record.version) == (before[1], __version__)
        tmemfs("upgrade", place.mountpoint)  # nothing is in the way of the next one
        assert figures(place)[2] == 1
    if "worker" in how:
        assert re.search(f"the upgrade failed: {why}", place.log.read_text())


STEPS = {
    "starts": ("candidate", "    _keep_from_children(manifest)\n"),
    "has adopted": ("candidate", "    channel.send(ADOPTS)\n"),
    "is ready": ("candidate", "    if channel.recv(len(GO)) != GO:\n"),
    "is to serve": ("candidate", "    memory.outlive_parent()\n"),
    "has a worker": ("trial", "        if is_serving and self._serving_since is None:\n"),
    "has passed": ("trial", "            self._channel.send(SERVES)\n"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_candidate_that_is_killed_half_way_leaves_the_version_before_serving(
    place: Place, other: OtherVersion, step: str
) -> None:
    before = figures(place)
    other.pause_before(*STEPS[step], step)
    with verifying(place):
        command = other.command(place.mountpoint)
        os.kill(other.reached(step), signal.SIGKILL)
        code, said = ended(command)
        assert code == 2 and "the new version has ended" in said, said
        assert figures(place) == before


@pytest.mark.parametrize("step", ["is to serve", "has a worker", "has passed"])
def test_a_candidate_goes_on_without_the_supervisor_that_it_replaces(place: Place, other: OtherVersion, step: str) -> None:
    pid = place.pid
    other.pause_before(*STEPS[step], step)
    if step == "is to serve":  # behind that line
        other.change("candidate", "    memory.outlive_parent()\n", "")
        other.change("candidate", f"    pause({step!r})\n", f"    memory.outlive_parent()\n    pause({step!r})\n")
    with verifying(place):
        command = other.command(place.mountpoint)
        candidate = other.reached(step)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: runtime.process_started(pid) is None)
        other.go_on()
        assert ended(command)[0] == 0
        assert figures(place) == (NEXT, candidate, 1)


def test_everything_ends_with_a_supervisor_that_is_killed_before_the_candidate_is_to_serve(
    place: Place, other: OtherVersion
) -> None:
    pid = place.pid
    other.pause_before(*STEPS["has adopted"], "has adopted")
    command = other.command(place.mountpoint)
    candidate = other.reached("has adopted")
    os.kill(pid, signal.SIGKILL)
    code, said = ended(command)
    assert code == 2 and "ended during the upgrade: run 'tmemfs down" in said
    wait_until(lambda: runtime.process_started(candidate) is None)
    assert "cleaned up after a daemon that had gone" in tmemfs("down", place.mountpoint).stdout


def test_a_command_that_ends_half_way_takes_the_candidate_with_it(place: Place, other: OtherVersion) -> None:
    before = figures(place)
    other.pause_before(*STEPS["has adopted"], "has adopted")
    command = other.command(place.mountpoint)
    candidate = other.reached("has adopted")
    command.kill()
    command.communicate()
    wait_until(lambda: runtime.process_started(candidate) is None)
    assert figures(place) == before


IMPATIENT = """
import sys
from tmemfs import handover
from tmemfs.cli import main
handover.START_S, handover.HANDOVER_S = 1.0, 1.0
sys.exit(main())
"""


@pytest.mark.parametrize("step", ["has adopted", "has a worker"])
def test_a_candidate_that_hangs_is_given_up(tmp_path: Path, other: OtherVersion, step: str) -> None:
    place = Place(tmp_path)
    place.mountpoint.mkdir()
    command = [sys.executable, "-c", IMPATIENT, "mount", *map(str, place.options), "--size", "64M", "--pool-max", "16M"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=HANG_S)
    try:
        before = figures(place)
        other.pause_before(*STEPS[step], step)
        with verifying(place):
            code, said = other.upgrade(place.mountpoint)
            assert code == 2 and re.search("was not ready after 1 s|did not serve within 1 s", said), said
            assert figures(place) == before
    finally:
        place.end()


def test_a_mount_that_answers_errors_is_served_again_by_another_version(tmp_path: Path, other: OtherVersion) -> None:
    place, dies = Place(tmp_path), tmp_path / "dies"
    place.mountpoint.mkdir()
    other.change(
        "worker",
        "    signals = SignalInbox()\n",
        f"    if os.path.exists({str(dies)!r}):\n        os._exit(9)\n    signals = SignalInbox()\n",
    )
    other.run("mount", *place.options, "--size", "64M", "--pool-max", "16M")
    try:
        with closing(StatusRegion(os.open(runtime.status_path(place.mountpoint), os.O_RDWR))) as status:
            with verifying(place):
                pass
            before = (tmp_path / "mnt" / "swap").open("rb", buffering=0)
            dies.touch()
            os.kill(status.words[Word.WORKER_PID], signal.SIGKILL)
            wait_until(lambda: status.words[Word.STATE] == State.GAVE_UP)
            with before, pytest.raises(OSError):
                before.read(PAGE_BYTES)
            code, said = other.upgrade(place.mountpoint)  # of no use
            assert code == 2 and "ended with 9" in said
            wait_until(lambda: status.words[Word.STATE] == State.GAVE_UP)
            tmemfs("upgrade", place.mountpoint)
            with verifying(place):
                assert figures(place)[0] == __version__ and "the mount answers errors" not in place.state
    finally:
        place.end()


def test_there_is_nothing_to_upgrade_without_a_daemon(tmp_path: Path) -> None:
    done = tmemfs("upgrade", tmp_path, check=False)
    assert done.returncode == 2 and "there is nothing to upgrade" in done.stderr


def test_a_daemon_without_the_socket_is_not_upgraded(place: Place) -> None:
    runtime.upgrade_path(place.mountpoint).unlink()
    done = tmemfs("upgrade", place.mountpoint, check=False)
    assert done.returncode == 2 and "cannot be upgraded" in done.stderr and "tmemfs down" in done.stderr
    assert place.state == "running"
