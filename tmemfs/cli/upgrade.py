"""How this version is made to take over from the one that serves a mount: the daemon is asked, and does it (handover.py).

With the standard library alone, as the command that repairs a broken installation should have.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Final

import tmemfs
from tmemfs.cli.targets import Target
from tmemfs.errors import Refused
from tmemfs.system import runtime

#: Longer than the daemon gives the new version for everything (handover.START_S, HANDOVER_S).
_ANSWERED_S: Final = 240.0
_LONGEST_MESSAGE: Final = 16 << 10


def upgrade(target: Target) -> str:
    """Have the daemon of `target` execute this version, and hand over to it; what it says. Raises Refused."""
    if target.daemon is None:
        raise Refused(f"no daemon serves {target.mountpoint}: there is nothing to upgrade, 'tmemfs up' starts this version")
    with _connected(target.mountpoint) as daemon:
        daemon.send(_request())
        try:
            answer = daemon.recv(_LONGEST_MESSAGE)
        except OSError as error:
            raise Refused(f"the daemon of {target.mountpoint} does not answer ({error}): see its log") from error
    if not answer:
        raise Refused(f"the daemon of {target.mountpoint} ended during the upgrade: run 'tmemfs down {target.mountpoint}'")
    found = json.loads(answer)
    if not found["done"]:
        raise Refused(f"not upgraded, {found['text']}: the version before serves {target.mountpoint} as before")
    return str(found["text"])


def _connected(mountpoint: Path) -> socket.socket:
    """A connection to the daemon. Raises Refused."""
    daemon = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    daemon.settimeout(_ANSWERED_S)
    try:
        daemon.connect(os.fspath(runtime.upgrade_path(mountpoint)))
    except OSError as error:
        daemon.close()
        raise Refused(
            f"the daemon of {mountpoint} cannot be upgraded ({error.strerror}): run 'tmemfs down {mountpoint}', then 'tmemfs up'"
        ) from error
    return daemon


def _request() -> bytes:
    """What the daemon is to execute: this interpreter with this package. See handover.Request."""
    # -P: the daemon's directory is /, in which nothing is looked for.
    command = (sys.executable, "-P", "-m", "tmemfs.candidate")
    return json.dumps({"command": command, "path": os.fspath(Path(tmemfs.__file__).parents[1])}).encode()
