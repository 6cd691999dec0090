"""Notifications to a service manager such as systemd (sd_notify(3)); nothing happens where there is none."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def notify(state: str) -> None:
    """Send `state` ('READY=1', 'STOPPING=1') to the socket named by NOTIFY_SOCKET; one that is gone is no error."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    # '@' stands for the NUL with which an abstract socket's name begins: an environment variable cannot contain it
    if address.startswith("@"):
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto(state.encode(), address)
