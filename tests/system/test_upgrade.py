"""A machine swaps on while another version takes over, again and again; and from the release before to this one."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import pytest

from tests.mounted import Place, swap_up, tmemfs
from tests.other_version import OtherVersion
from tests.system.test_swap import LONG_S, hog, limited, meanwhile
from tmemfs import __version__

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
HARMLESS = ("stores_refused", "corrupt_records", "read_errors", "write_errors")


def git(*words: str) -> bytes:
    """What git says; nothing where this is no checkout, or there is no git."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""


def previous_release(root: Path) -> OtherVersion:
    """The newest tagged version whose supervisor hands over; before there is one, this version with another number."""
    for tag in git("tag", "--sort=-creatordate").decode().split():
        if git("ls-tree", "--name-only", tag, "tmemfs/handover.py"):
            with tarfile.open(fileobj=io.BytesIO(git("archive", tag, "tmemfs"))) as files:
                files.extractall(root, filter="data")
            return OtherVersion(root)
    return OtherVersion.copy(root).change("__init__", __version__, "0.0.9")


@contextmanager
def swap_of(version: OtherVersion, directory: Path) -> Iterator[Place]:
    """An active swap on a daemon of that version."""
    place = Place(directory)
    place.mountpoint.mkdir()
    try:
        version.run("up", *place.options, "--size", "2G", "--pool-max", "128M")
        yield place
    finally:
        place.end()


def layout(root: Path) -> str:
    """The line that says which layout of the regions a version has."""
    return next(line for line in (root / "tmemfs" / "holdings.py").read_text().splitlines() if line.startswith("LAYOUT"))


@pytest.mark.timeout(2 * LONG_S)
def test_this_version_takes_over_from_the_release_before_while_a_hog_swaps(tmp_path: Path) -> None:
    before = previous_release(tmp_path / "before")
    can_adopt = layout(before.root) == layout(ROOT)
    with swap_of(before, tmp_path) as place, limited("release", "64M") as cgroup:
        pid, done = place.pid, list[int]()

        def upgrade() -> None:
            if not done and place.number("stores") > 10_000:
                done.append(tmemfs("upgrade", place.mountpoint, check=False).returncode)

        with meanwhile(upgrade, 0.1):
            hog(cgroup, "256M", rounds=3)
        assert done == [0 if can_adopt else 2]
        assert (place.pid != pid) == can_adopt == (place.flat()["version"] == __version__)
        assert {place.flat("events")[key] for key in HARMLESS} == {"0"}
        assert place.mountpoint.name in tmemfs("down", place.mountpoint).stdout


@pytest.mark.timeout(2 * LONG_S)
def test_a_hog_loses_nothing_by_upgrades_and_by_versions_that_cannot_take_over(tmp_path: Path) -> None:
    broken = OtherVersion.copy(tmp_path / "broken").change(
        "worker", "    signals = SignalInbox()\n", "    raise Refused('broken')\n"
    )
    good = OtherVersion(ROOT)
    with swap_up(tmp_path, size="2G", pool_max="64M") as place, limited("upgrades", "64M") as cgroup:
        versions, done = cycle((good, broken)), list[int]()

        def upgrade() -> None:
            done.append(next(versions).upgrade(place.mountpoint)[0])

        while len(done) < 4:
            with meanwhile(upgrade, 0.1):
                hog(cgroup, "256M", rounds=2)
        assert done[:4] == [0, 2, 0, 2]
        assert place.number("upgrades") == done.count(0)
        assert place.flat()["worker_killed"] == place.flat()["worker_crashed"] == "0"
        assert {place.flat("events")[key] for key in HARMLESS} == {"0"}
        tmemfs("down", place.mountpoint)
