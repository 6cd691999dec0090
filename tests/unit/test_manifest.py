"""The manifest and the request of a handover: what another version writes is read, and another layout is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tmemfs import __version__
from tmemfs.backing import OpenTier
from tmemfs.errors import Refused
from tmemfs.handover import Request
from tmemfs.holdings import LAYOUT, Geometry
from tmemfs.manifest import Manifest
from tmemfs.options import Options

OPTIONS = Options(Path("/mnt/\udcff"), 1 << 30, "1G", Path("/srv/backing"), codec="zstd:3", encrypt=False, watchdog_s=2.5)
MANIFEST = Manifest(
    layout=LAYOUT,
    version="0.0.9",
    supervisor=4711,
    options=OPTIONS,
    geometry=Geometry(1, 2, 3, 4, 5, 6),
    init=bytes(range(256)),
    resends=True,
    tier=OpenTier({"backing": 7}, 1 << 40, False),
    fds={"device": 3, "backing": 7},
)


def test_a_manifest_is_read_as_it_was_written() -> None:
    assert Manifest.decode(MANIFEST.encode()) == MANIFEST
    in_ram = replace(MANIFEST, options=replace(OPTIONS, backing=None, log=Path("/var/log/x")))
    assert Manifest.decode(in_ram.encode()) == in_ram


def test_what_a_newer_version_says_is_ignored_and_what_an_older_one_does_not_say_has_its_default() -> None:
    found = json.loads(MANIFEST.encode())
    found["new"] = found["options"]["new"] = found["geometry"]["new"] = found["tier"]["new"] = 1
    del found["options"]["watchdog_s"]
    assert Manifest.decode(json.dumps(found).encode()) == replace(
        MANIFEST, options=replace(OPTIONS, watchdog_s=Options(Path("/"), 0).watchdog_s)
    )


def test_another_layout_is_refused_before_anything_else_is_read() -> None:
    with pytest.raises(Refused, match=f"version {__version__} has layout {LAYOUT} .* has {LAYOUT + 1}: .*'tmemfs down'"):
        Manifest.decode(json.dumps({"layout": LAYOUT + 1, "init": None}).encode())


def test_a_request_is_read_as_it_was_written_and_anything_else_is_refused() -> None:
    request = Request(("/usr/bin/python3", "-m", "x"), "/a path")
    assert Request.decode(request.encode()) == request
    for text in (b"", b"x", b"1", b"[]", b"{}", b'{"command": 1, "path": ""}', b"\xff"):
        with pytest.raises(ValueError):
            Request.decode(text)
