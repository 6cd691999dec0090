"""A block device as the backing, with and without discards: its extents are used again and again."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.mounted import wait_until
from tests.parts import new_tmem, page_of
from tmemfs.engine import Engine
from tmemfs.jobs.shrink_request import ShrinkRequest
from tmemfs.store.codec import parse_codec
from tmemfs.store.statistics import statistics
from tmemfs.tiers.file import FileTier
from tmemfs.units import MIB, PAGE_BYTES

pytestmark = pytest.mark.system

#: Header and extents of the device.
_EXTENTS = 10
_PAGES = 1536
_LOOP_CTL_REMOVE = 0x4C81


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate((2 + _EXTENTS) * MIB)
    name = subprocess.check_output(["losetup", "--find", "--show", image], text=True).strip()
    try:
        yield Path(name)
    finally:
        subprocess.run(["losetup", "--detach", name], check=True)
        remove_loop_device(int(name.removeprefix("/dev/loop")))


def remove_loop_device(number: int) -> None:
    """Remove it whole: one whose discards were turned off keeps them off for whatever it is attached to next."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        wait_until(lambda: is_removed(control, number))
    finally:
        os.close(control)


def is_removed(control: int, number: int) -> bool:
    try:
        fcntl.ioctl(control, _LOOP_CTL_REMOVE, number)
    except OSError as error:
        if error.errno == errno.EBUSY:  # it is let go of a moment after it was detached
            return False
        raise
    return True


@pytest.mark.parametrize("can_discard", [True, False])
async def test_a_device_is_not_full_while_nothing_lives_on_it(device: Path, can_discard: bool) -> None:
    limit = Path("/sys/block", device.name, "queue/discard_max_bytes")
    if not can_discard:
        limit.write_text("0")
    elif not int(limit.read_text()):
        pytest.skip("the file system of the temporary directory has no holes, so its loop devices cannot discard")
    tier = FileTier(device)
    try:
        assert tier.can_discard == can_discard
        engine = Engine.over(partial(new_tmem, slots=8192, frames=32, limit=12, extents=_EXTENTS), tier, parse_codec("lz4"))
        for _ in range(4):
            for slot in range(_PAGES):
                engine.pager.write(slot * PAGE_BYTES, memoryview(page_of("raw", slot)))
            assert (await engine.shrinker.shrink(ShrinkRequest.parse("all"))).reason is None
            engine.tmem.invalidate(0, _PAGES)
        await engine.shrinker.shrink(ShrinkRequest.parse("all"))
        assert statistics(engine.tmem).backing_current == engine.holes.counts.discard_errors == 0
        assert bool(engine.holes.counts.discarded) == can_discard
    finally:
        tier.close()
