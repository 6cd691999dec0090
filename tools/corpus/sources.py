"""The sources: six programs in typical use, what each holds in memory, and how to know that it does.

    postgresql   a server and four sessions of pgbench at work; its shared buffers are most of it, of the kind `shared`
    redis        sessions, users, lists, scores and cached bodies, some of them compressed (redis_values.py)
    chromium     without a window, showing a page of articles, a table, canvases and a heap (programs/page.html)
    jvm          collections of records and strings, and the compiler that launched them (programs/Heap.java)
    node         maps, objects, strings, buffers (programs/heap.js)
    pandas       frames and fitted models (programs/frames.py), in the virtual environment that `make corpus` makes

Text is English: the help texts that come with Python. pgbench has no text: its rows are padded with blanks, which compress well.
Data is generated with fixed seeds, but the pages differ between runs because of allocators, hash seeds, threads and the time of
garbage collections (the JVM had 73,000 to 92,000 pages). `start` returns when the program holds everything: the process whose
family is to be captured.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from pydoc_data import topics
from typing import Final
from urllib.request import ProxyHandler, build_opener

from tools.corpus.redis_values import commands
from tools.corpus.stage import Stage, Started

_PROGRAMS: Final = Path(__file__).with_name("programs")
_REDIS_USERS: Final = 60_000
_BATCH: Final = 1000
_ANSWER_S: Final = 30.0
#: Seconds of pgbench, counted by its progress lines.
_PGBENCH_S: Final = 10
_PGBENCH_SCALE: Final = "10"
_HEAP_MIB: Final = 512


@dataclass(frozen=True, slots=True)
class Source:
    """A program: what it `needs` (see `locate`), the packages that have that, and how to start it."""

    name: str
    needs: tuple[str, ...]
    packages: str
    start: Callable[[Stage], Started]


def missing(source: Source, locate: Callable[[str], Path | None]) -> str:
    """Why `source` cannot be started here, with the next step; empty if it can."""
    lacks = [need for need in source.needs if locate(need) is None]
    return f"no {', '.join(lacks)}: run 'sudo make corpus', or install {source.packages}" if lacks else ""


def locate(need: str) -> Path | None:
    """The path of a program of PostgreSQL (which Debian keeps off the PATH), on the PATH, or with a '/', in our environment."""
    if "/" in need:
        return next(iter(sorted(Path(sys.prefix).glob(need))), None)
    servers = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{need}"))
    found = servers[-1] if servers else shutil.which(need)
    return Path(found) if found else None


def _program(need: str) -> Path:
    found = locate(need)
    assert found, f"{need}: `missing` was not asked"
    return found


def prose() -> str:
    """Some hundred kilobytes of English."""
    return "\n".join(map(str, topics.topics.values()))


def _postgresql(stage: Stage) -> Started:
    data = stage.directory / "data"
    stage.run("initdb", [_program("initdb"), "-D", data, "-U", "bench", "--auth=trust", "--no-sync"], as_nobody=True)
    server = stage.start(
        "postgres", [_program("postgres"), "-D", data, "-k", stage.directory, "-c", "listen_addresses="], as_nobody=True
    )
    server.wait_for_word("ready to accept connections")
    pgbench: list[str | Path] = [_program("pgbench"), "-h", stage.directory, "-U", "bench"]
    stage.run("pgbench-init", [*pgbench, "-i", "-q", "-s", _PGBENCH_SCALE, "postgres"])
    sessions = stage.start("pgbench", [*pgbench, "-c", "4", "-j", "2", "-T", "3600", "-P", "1", "postgres"])
    sessions.wait_for_word("progress:", times=_PGBENCH_S)
    return server


def _redis(stage: Stage) -> Started:
    place = stage.directory / "redis.sock"
    options: list[str | Path] = ["--port", "0", "--unixsocket", place, "--save", "", "--dir", stage.directory]
    server = stage.start("redis-server", [_program("redis-server"), *options])
    server.wait_until(lambda: place.exists() and "ready to accept connections" in server.said().lower())
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_ANSWER_S)
        connection.connect(str(place))
        _fill(connection, commands(_REDIS_USERS, prose()))
    return server


def _fill(connection: socket.socket, wanted: Iterator[bytes]) -> None:
    """Send commands, some at a time, and read the answers. Raises OSError for an error."""
    with connection.makefile("rb") as answers:
        while batch := list(islice(wanted, _BATCH)):
            connection.sendall(b"".join(batch))
            for _ in batch:
                answer = answers.readline()
                if not answer or answer.startswith(b"-"):
                    raise OSError(f"redis refused what it was given: {answer.decode(errors='replace').strip() or 'it ended'}")


def _chromium(stage: Stage) -> Started:
    profile = stage.directory / "profile"
    page = stage.write("page.html", (_PROGRAMS / "page.html").read_text().replace("@PROSE@", prose().replace("<", " ")))
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-breakpad", "--disable-component-update",
        "--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={profile}",
    ]  # fmt: skip
    browser = stage.start("chromium", [_program("chromium"), *flags, page.as_uri()], as_nobody=True)
    browser.wait_until(lambda: "ready" in _titles(profile / "DevToolsActivePort"))
    return browser


def _titles(port_file: Path) -> list[str]:
    """The titles of the pages that a browser shows; none while it does not answer."""
    with suppress(OSError, ValueError, IndexError, HTTPException):
        port = int(port_file.read_text().splitlines()[0])
        with build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{port}/json/list", timeout=_ANSWER_S) as answer:
            return [one["title"] for one in json.load(answer)]
    return []


def _jvm(stage: Stage) -> Started:
    options = [f"-Xmx{_HEAP_MIB}m", "-XX:-UsePerfData"]
    return _reader(stage, "java", [_program("java"), *options, _PROGRAMS / "Heap.java"])


def _node(stage: Stage) -> Started:
    return _reader(stage, "node", [_program("node"), f"--max-old-space-size={_HEAP_MIB}", _PROGRAMS / "heap.js"])


def _pandas(stage: Stage) -> Started:
    return _reader(stage, "python", [_program("corpus/bin/python"), "-B", _PROGRAMS / "frames.py"])


def _reader(stage: Stage, name: str, command: list[str | Path]) -> Started:
    """Start a program that gets a file of prose and prints 'ready'."""
    started = stage.start(name, [*command, stage.write("prose.txt", prose())])
    started.wait_for_word("ready")
    return started


SOURCES: Final = (
    Source("postgresql", ("initdb", "postgres", "pgbench"), "postgresql (Debian)", _postgresql),
    Source("redis", ("redis-server",), "redis-server (Debian)", _redis),
    Source("chromium", ("chromium",), "chromium (Debian)", _chromium),
    Source("jvm", ("java", "javac"), "default-jdk-headless (Debian)", _jvm),
    Source("node", ("node",), "nodejs (Debian)", _node),
    Source(
        "pandas",
        ("corpus/bin/python", "corpus/lib/python*/site-packages/pandas", "corpus/lib/python*/site-packages/sklearn"),
        f"pandas and scikit-learn (PyPI) into {sys.prefix}/corpus",
        _pandas,
    ),
)
