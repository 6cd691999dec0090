"""redis-server in a memory cgroup, on a socket of its own, without persistence."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.bench.limited import started, wait_until, within
from tools.bench.redis_client import RedisClient
from tools.cgroup import MemoryCgroup


@contextmanager
def redis_server(place: Path, cgroup: MemoryCgroup, **more: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The server and its socket below `place`; `more` are options of it, with underscores for dashes."""
    path, log = place / "redis.sock", place / "redis.log"
    options = {"port": "0", "unixsocket": str(path), "save": "", "appendonly": "no", "dir": str(place), **more}
    words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
    path.unlink(missing_ok=True)
    with started(within(cgroup, "redis-server", *words), log) as server:
        wait_until(path.exists, server, log)
        yield server, path


@contextmanager
def redis_client(path: Path, base: Path, value_bytes: int, answer_s: float) -> Iterator[RedisClient]:
    """A client that waits `answer_s` for an answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(answer_s)
        connection.connect(str(path))
        with connection.makefile("rwb") as stream:
            yield RedisClient(stream, base.read_bytes(), value_bytes)
