"""Real programs whose memory does not fit: each in a memory cgroup with half the memory that its data need.

    redis     redis-server holding values cut out of real pages; GETs of uniformly random keys by redis-benchmark, 4 at a time
    pgbench   PostgreSQL with its tables in shared_buffers, which are larger than the limit; select only, 4 clients
    sort      sort of lines of English text, all of them in its memory
    compile   two g++ at once

The program itself is in the cgroup. What sends requests to it, feeds it or reads its output is not, and neither is the page cache
of the files, which are written and synced before. So bytes at the disk are those of the swap, except for a little of the programs'
own code. An operation is a GET, a transaction, a line or a compiled file; CPU (of the programs in the cgroup), pages and bytes are
given per operation. What redis and sort return is verified. A program that fails, or loses a process to the OOM killer, fails its
own sample only; the others are run. Nothing of a program outlives its cgroup.
"""

from __future__ import annotations

import csv
import os
import pwd
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from random import Random
from typing import Final

import xxhash

from tmemfs.units import MIB, PAGE_BYTES
from tools.bench.contenders import Swap
from tools.bench.limited import (
    PROGRAM_S,
    ProgramFailed,
    costs,
    each_limited,
    measured,
    output,
    started,
    wait_gone,
    wait_until,
    within,
)
from tools.bench.redis_client import BATCH, SPREAD, VALUE_BESIDE_BYTES
from tools.bench.redis_server import redis_client, redis_server
from tools.bench.toucher import WrongBytes
from tools.bench.workloads import Figures
from tools.cgroup import MemoryCgroup

_CLIENTS: Final = 4
_POSTGRES: Final = Path("/usr/lib/postgresql")
_UNPRIVILEGED: Final = "nobody"
#: What the programs take is memory.memsw.usage_in_bytes of their cgroups, RAM and swap (VALUE_BESIDE_BYTES too).
#: 100,000 rows, their index, and what PostgreSQL 15 has beside them: 273 MiB at scale 16.
_SCALE_BYTES: Final = 17 * MIB
#: sort's own record of a line, and half of that again to merge into: 120 MiB for 120,000 lines of 1000 bytes (coreutils 9.1).
_SORT_BESIDE_BYTES: Final = 48
#: g++ 12 of _SOURCE, at its largest: 531 MiB for two.
_COMPILER_BYTES: Final = 265 * MIB
_SOURCE: Final = """\
#include <bits/stdc++.h>
int main(int count, char **words) {
    std::map<std::string, std::vector<int>> seen;
    for (int at = 0; at < count; at++) seen[words[at]].push_back(at);
    return std::regex_match(words[0], std::regex(".*[0-9]+")) + int(seen.size());
}
"""
_POSTGRES_OPTIONS: Final = {
    "listen_addresses": "", "max_connections": "20", "fsync": "off", "synchronous_commit": "off", "full_page_writes": "off",
    "wal_level": "minimal", "max_wal_senders": "0", "checkpoint_timeout": "1h", "bgwriter_lru_maxpages": "0", "autovacuum": "off",
    "huge_pages": "off", "jit": "off", "dynamic_shared_memory_type": "mmap",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    redis_values: int
    value_bytes: int
    pgbench_scale: int
    lines: int
    line_bytes: int
    compilers: int
    #: How long requests are sent to redis and pgbench.
    seconds: float

    @property
    def data_bytes(self) -> dict[str, int]:
        """The memory that the data of each program need."""
        return {
            "redis": self.redis_values * (self.value_bytes + VALUE_BESIDE_BYTES),
            "pgbench": self.pgbench_scale * _SCALE_BYTES,
            "sort": self.lines * (self.line_bytes + _SORT_BESIDE_BYTES),
            "compile": self.compilers * _COMPILER_BYTES,
        }

    def limit_bytes(self, program: str) -> int:
        """The limit of the cgroup: half of the data."""
        return self.data_bytes[program] // 2 // PAGE_BYTES * PAGE_BYTES

    @property
    def shared_buffers_bytes(self) -> int:
        """All tables and half as much again: nothing is evicted, so what does not fit is swapped."""
        return self.data_bytes["pgbench"] * 3 // 2

    @property
    def swap_bytes(self) -> int:
        """Four times what is swapped: the kernel keeps slots of clean pages until a swap is half full."""
        return 4 * max(self.data_bytes.values())


SIZES: Final = Sizes(160_000, 1000, pgbench_scale=16, lines=120_000, line_bytes=1000, compilers=2, seconds=6)


@dataclass(frozen=True, slots=True)
class Stage:
    """What a program runs on; `place` has the files that all contenders share."""

    swap: Swap
    base: Path
    place: Path
    sizes: Sizes
    seed: int


def programs(stage: Stage) -> Iterator[tuple[str, Figures]]:
    """The figures of each installed program, and how many processes the OOM killer ended. Raises ProgramFailed at the end."""
    stage.place.mkdir(exist_ok=True)
    stage.place.parent.chmod(0o711)  # PostgreSQL runs as another user
    absent = missing()
    limits = {name: stage.sizes.limit_bytes(name) for name in _PROGRAMS if name not in absent}
    yield from each_limited("real", limits, lambda name, cgroup: _PROGRAMS[name](stage, cgroup))


def missing() -> dict[str, str]:
    """The programs that are not installed, and the Debian packages that have them."""
    have = {
        "redis": shutil.which("redis-server") and shutil.which("redis-benchmark"),
        "pgbench": postgres_programs(_POSTGRES),
        "sort": shutil.which("sort"),
        "compile": shutil.which("g++"),
    }
    package = {"redis": "redis-server", "pgbench": "postgresql", "sort": "coreutils", "compile": "g++"}
    return {name: f"not installed: apt-get install {package[name]}" for name, place in have.items() if not place}


def postgres_programs(place: Path) -> Path | None:
    """The directory of the newest server and pgbench: Debian has them in VERSION/bin, not in PATH."""
    found = [one.parent for one in place.glob("*/bin/postgres") if (one.parent / "pgbench").exists()]
    return max(found, key=lambda one: float(one.parent.name), default=None)


def _made(place: Path, make: Callable[[Path], None]) -> Path:
    """`place`, made at the first call; it is complete on disk or does not exist."""
    if not place.exists():
        # an interrupted run may have left a part of it
        fresh = place.with_name(f"{place.name}.fresh")
        shutil.rmtree(fresh, ignore_errors=True)
        make(fresh)
        # what is written later would be counted as bytes of the swap
        os.sync()
        fresh.rename(place)
    return place


# redis


def _redis(stage: Stage, cgroup: MemoryCgroup) -> Figures:
    keys = stage.sizes.redis_values
    with (
        redis_server(stage.place, cgroup) as (server, path),
        redis_client(path, stage.base, stage.sizes.value_bytes, PROGRAM_S) as client,
    ):
        client.fill(keys)
        # a first run finds out how many requests take the wanted time
        count = max(int(_redis_get(path, BATCH * 8, keys)["rate_per_s"] * stage.sizes.seconds), BATCH)
        figures, used = measured(stage.swap, (server.pid,), lambda: _redis_get(path, count, keys))
        client.verify(Random(stage.seed).sample(range(keys), BATCH))
    return {**costs(used, count), **figures}


def _redis_get(path: Path, count: int, keys: int) -> Figures:
    command = ["redis-benchmark", "-s", str(path), "-c", str(_CLIENTS), "-n", str(count), "-r", str(keys), "--csv",
               "GET", "key:__rand_int__"]  # fmt: skip
    return parse_redis_benchmark(output(command).decode())


def parse_redis_benchmark(text: str) -> Figures:
    """Requests per second and percentiles of `redis-benchmark --csv` with one test."""
    for row in csv.DictReader(text.splitlines()):
        latencies = {f"p{percent}_us": float(row[f"p{percent}_latency_ms"]) * 1e3 for percent in (50, 99)}
        return {"rate_per_s": float(row["rps"]), **latencies}
    raise ValueError(f"no figures in what redis-benchmark said: {text}")


# pgbench


def _pgbench(stage: Stage, cgroup: MemoryCgroup) -> Figures:
    cluster = _made(stage.place / "cluster", lambda fresh: _make_cluster(fresh, stage.sizes))
    with _postgres(cluster, stage.sizes, cgroup) as server:
        # all of it into shared_buffers, which then do not fit: what is measured is swap, not reads of tables
        tables = ("pgbench_accounts", "pgbench_accounts_pkey")
        _psql(cluster, *(f"select pg_prewarm('{one}')" for one in tables))
        _ask_postgres(cluster, stage, cgroup, stage.sizes.seconds / 3)
        ask = partial(_ask_postgres, cluster, stage, cgroup, stage.sizes.seconds)
        (count, figures), used = measured(stage.swap, (server.pid,), ask)
    return {**costs(used, count), **figures}


def _ask_postgres(cluster: Path, stage: Stage, cgroup: MemoryCgroup, seconds: float) -> tuple[int, Figures]:
    """Run pgbench, and wait until the last backend has ended: only then does its CPU time count as the server's."""
    options = f"--select-only --protocol=prepared --client={_CLIENTS} --time={seconds:.0f} --random-seed={stage.seed} postgres"
    said = output([*_client(cluster, "pgbench"), *options.split()]).decode()
    wait_gone(cgroup, b"[local]")
    return parse_pgbench(said)


def parse_pgbench(text: str) -> tuple[int, Figures]:
    """The number of transactions, and their rate without connecting. Raises ValueError if one failed."""
    count = re.search(r"^number of transactions actually processed: (\d+)", text, re.MULTILINE)
    rate = re.search(r"^tps = ([\d.]+) \(without initial", text, re.MULTILINE)
    failed = re.search(r"^number of failed transactions: ([1-9]\d*)", text, re.MULTILINE)
    if not count or not rate or failed:
        raise ValueError(f"no figures in what pgbench said: {text}")
    return int(count[1]), {"rate_per_s": float(rate[1])}


def _make_cluster(place: Path, sizes: Sizes) -> None:
    """Write everything and shut down, so that no later server has to write."""
    user = pwd.getpwnam(_UNPRIVILEGED)
    place.mkdir(mode=0o700)
    os.chown(place, user.pw_uid, user.pw_gid)
    options = "--auth=trust --username=bench --no-sync --locale=C"
    output([*_unprivileged(), str(_postgres_bin() / "initdb"), *options.split(), str(place)])
    with _postgres(place, sizes, None):
        output([*_client(place, "pgbench"), "--initialize", "--quiet", f"--scale={sizes.pgbench_scale}", "postgres"])
        _psql(place, "create extension pg_prewarm")


@contextmanager
def _postgres(cluster: Path, sizes: Sizes, cgroup: MemoryCgroup | None) -> Iterator[subprocess.Popen[bytes]]:
    """A server on its own socket in `cluster`, shut down at the end. Its System V objects end with its IPC namespace."""
    size = {"shared_buffers": f"{sizes.shared_buffers_bytes >> 10}kB"}
    options = {**_POSTGRES_OPTIONS, **size, "unix_socket_directories": str(cluster)}
    words = [f"--{key}={value}" for key, value in options.items()]
    command = [*_unprivileged(), str(_postgres_bin() / "postgres"), "-D", str(cluster), *words]
    log = cluster.parent / "postgres.log"
    with started(within(cgroup, *command), log, signal.SIGINT) as server:
        ready = [*_client(cluster, "pg_isready"), "--quiet"]
        wait_until(lambda: not subprocess.run(ready, check=False).returncode, server, log)
        yield server


def _unprivileged() -> list[str]:
    user = pwd.getpwnam(_UNPRIVILEGED)
    return ["unshare", "--ipc", "setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _client(cluster: Path, name: str) -> list[str]:
    return [str(_postgres_bin() / name), f"--host={cluster}", "--username=bench"]


def _psql(cluster: Path, *statements: str) -> None:
    options = ["--no-psqlrc", "--set=ON_ERROR_STOP=1", *(f"--command={one}" for one in statements)]
    output([*_client(cluster, "psql"), *options, "postgres"])


def _postgres_bin() -> Path:
    place = postgres_programs(_POSTGRES)
    assert place  # or pgbench would be missing()
    return place


# sort


def _sort(stage: Stage, cgroup: MemoryCgroup) -> Figures:
    sizes = stage.sizes
    lines = _made(stage.place / "lines", lambda fresh: _write_lines(fresh, sizes))
    # More than all of it, and no place for temporary files: were one wanted, sort would fail. One thread: of 12 runs with two, the
    # OOM killer ended 3 although there was swap (Linux 6.18), of 6 with one none; but of 2 with one and lines twice as many, one.
    options = [f"--buffer-size={2 * sizes.data_bytes['sort']}b", "--parallel=1", f"--temporary-directory={lines / 'none'}"]
    command = within(cgroup, "sort", *options)
    with (lines / "shuffled").open("rb") as shuffled:
        said, used = measured(stage.swap, (), lambda: output(command, shuffled, {"LC_ALL": "C"}))
    if xxhash.xxh3_128_hexdigest(said) != (lines / "sorted.xxh3").read_text():
        raise WrongBytes("sort printed other lines than it was given, or in another order")
    return {**costs(used, sizes.lines), "rate_per_s": 1 / used.wall_s}


def _write_lines(place: Path, sizes: Sizes) -> None:
    lines = sorted_lines(sizes.lines, sizes.line_bytes)
    place.mkdir()
    (place / "sorted.xxh3").write_text(xxhash.xxh3_128_hexdigest(b"".join(lines)))
    Random(1).shuffle(lines)
    (place / "shuffled").write_bytes(b"".join(lines))


def sorted_lines(count: int, line_bytes: int) -> list[bytes]:
    """Lines of `line_bytes` bytes, including the newline: a number, and English from the manual of Python."""
    text = " ".join(" ".join(topics.values()).split()).encode("ascii", "replace")
    length = line_bytes - len("00000000 \n")
    return [b"%08d %s\n" % (one, text[(at := one * SPREAD % (len(text) - length)) : at + length]) for one in range(count)]


# compile


def _compile(stage: Stage, cgroup: MemoryCgroup) -> Figures:
    place = _made(stage.place / "compile", _make_source)
    command = within(cgroup, "g++", "-O1", "-c", str(place / "source.cc"), "-o")
    count = stage.sizes.compilers
    outputs = [place / f"{number}.o" for number in range(count)]
    _, used = measured(stage.swap, (), lambda: _all_at_once([[*command, str(one)] for one in outputs], stage.place / "compile.log"))
    return {**costs(used, count), "rate_per_s": 1 / used.wall_s}


def _make_source(place: Path) -> None:
    """Write the source, and compile it once."""
    # headers and compiler are in the page cache for all contenders then
    place.mkdir()
    (place / "source.cc").write_text(_SOURCE)
    output(["g++", "-O1", "-c", str(place / "source.cc"), "-o", str(place / "0.o")])


def _all_at_once(commands: Sequence[Sequence[str]], log: Path) -> None:
    with ExitStack() as stack:
        logs = [log.with_suffix(f".{number}") for number in range(len(commands))]
        processes = [stack.enter_context(started(command, said)) for command, said in zip(commands, logs, strict=True)]
        for process, said in zip(processes, logs, strict=True):
            if code := process.wait(PROGRAM_S):
                raise ProgramFailed(f"exit code {code}: {said.read_text(errors='replace').strip()[-500:]}")


_PROGRAMS: Final[dict[str, Callable[[Stage, MemoryCgroup], Figures]]] = {
    "redis": _redis,
    "pgbench": _pgbench,
    "sort": _sort,
    "compile": _compile,
}
