"""A daemon whose handlers fail goes on: one caller gets EIO, the others what they asked for."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from tests.mounted import Place, wait_until
from tests.parts import page_of
from tests.waiting import HANG_S
from tmemfs.units import PAGE_BYTES

pytestmark = pytest.mark.fuse

_FAILING: Final = """
import sys
from tmemfs.cli import main
from tmemfs.fuse.namespace import Namespace

async def fail(self, *arguments):
    raise RuntimeError("injected")

for name in sys.argv[1].split():
    setattr(Namespace, name, fail)
sys.exit(main(["mount", "--foreground", *sys.argv[2:]]))
"""


def test_handlers_that_fail_do_not_end_the_daemon(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.mountpoint.mkdir()
    handlers = "statfs readdir release releasedir flush fsync setattr setxattr getxattr unlink create mkdir write forget poll"
    with place.log.open("w") as log:
        command = [
            sys.executable,
            "-c",
            _FAILING,
            handlers,
            *map(str, (place.mountpoint, "--backing", place.backing)),
            "--size",
            "64M",
        ]
        daemon = subprocess.Popen(command, stderr=log, stdout=log)
        try:
            wait_until(lambda: (place.mountpoint / "control" / "state").exists())
            for act in (
                lambda: os.statvfs(place.mountpoint), lambda: os.listdir(place.mountpoint), lambda: os.chmod(place.image, 0o644),
                lambda: os.unlink(place.image), lambda: os.mkdir(place.mountpoint / "x"), lambda: place.write("codec", "zstd"),
                lambda: os.open(place.mountpoint / "x", os.O_CREAT | os.O_RDWR), lambda: os.setxattr(place.image, "user.a", b""),
            ):  # fmt: skip
                with pytest.raises(OSError) as caught:
                    act()
                assert caught.value.errno == errno.EIO
            with suppress(OSError):
                place.read("state")  # the close that follows fails
            fd = os.open(place.image, os.O_RDWR)
            os.pwrite(fd, page_of("half", 1), 0)
            assert os.pread(fd, PAGE_BYTES, 0) == page_of("half", 1)
            with suppress(OSError):
                os.close(fd)
            assert daemon.poll() is None
        finally:
            subprocess.run(["umount", "--lazy", place.mountpoint], check=True)
            daemon.wait(HANG_S)
    text = place.log.read_text()
    assert text.count("bug in tmemfs") == text.count("RuntimeError: injected") == 1  # all of them are one place
    assert daemon.returncode == 0
