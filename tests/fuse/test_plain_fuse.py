"""The contender without the relay (tools/bench/plain_fuse.py): what it serves is right, or its figures mean nothing."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parts import page_of
from tmemfs.units import MIB, PAGE_BYTES
from tools.bench import plain_fuse
from tools.bench.mounts import Mount

pytestmark = pytest.mark.fuse


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    with plain_fuse.mounted(tmp_path, "mnt", 64 * MIB, "16M") as mount:
        yield mount
    assert not (tmp_path / "mnt" / "swap").exists()


@pytest.fixture
def image(mount: Mount) -> Iterator[int]:
    fd = os.open(mount.mountpoint / "swap", os.O_RDWR)
    yield fd
    os.close(fd)


def test_any_offset_and_length_reads_what_was_written(mount: Mount, image: int) -> None:
    rng = random.Random(7)
    model = bytearray(2 * MIB)
    for step in range(400):
        length = rng.choice([1, 512, 4096, 5000, 65536, 300_000])
        offset = rng.randrange(len(model) - length)
        offset -= offset % rng.choice([1, 512, 4096])
        if rng.random() < 0.5:
            data = b"".join(page_of("half", rng.randrange(9999)) for _ in range(length // PAGE_BYTES + 1))[:length]
            assert os.pwrite(image, data, offset) == length
            model[offset : offset + length] = data
        else:
            assert os.pread(image, length, offset) == model[offset : offset + length], (step, offset, length)
        if step % 100 == 99:
            mount.write("shrink", "all")
    assert int(mount.stat()["loads_disk"]) > 10


def test_more_than_the_pool_holds_is_written_back_and_read_again(mount: Mount, image: int) -> None:
    for slot in range(8192):
        os.pwrite(image, page_of("raw", slot), slot * PAGE_BYTES)
    for slot in range(0, 8192, 7):
        assert os.pread(image, PAGE_BYTES, slot * PAGE_BYTES) == page_of("raw", slot)


def test_its_control_files_are_those_of_the_daemon(mount: Mount) -> None:
    mount.write("pool.high", "8M")
    assert (mount.mountpoint / "control" / "pool.high").read_text() == f"{8 * MIB}\n"
    with pytest.raises(OSError, match="Invalid argument"):
        mount.write("codec", "gzip")
    assert (mount.mountpoint / "control" / "state").read_text().startswith("running\n")
