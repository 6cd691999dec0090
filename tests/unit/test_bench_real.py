"""Real programs under a limit, the pure parts: what they print, what they are given, what the table says."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from tmemfs.units import MIB, PAGE_BYTES
from tools.bench import goals
from tools.bench.accounts import DiskCounters, Usage
from tools.bench.limited import costs, parse_stat_reaped_s
from tools.bench.real import SIZES, Sizes, parse_pgbench, parse_redis_benchmark, postgres_programs, sorted_lines
from tools.bench.redis_client import RedisClient, redis_key, redis_request
from tools.bench.statistics import Sample
from tools.bench.toucher import WrongBytes

REDIS = """\
"test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms","p95_latency_ms","p99_latency_ms","max_latency_ms"
"GET key:__rand_int__","70921.98","0.035","0.008","0.039","0.055","0.071","1.631"
"""
PGBENCH = """\
pgbench (15.18 (Debian 15.18-0+deb12u1))
transaction type: <builtin: select only>
scaling factor: 16
query mode: prepared
number of clients: 4
number of threads: 1
maximum number of tries: 1
duration: 6 s
number of transactions actually processed: 63149
number of failed transactions: 0 (0.000%)
latency average = 0.380 ms
initial connection time = 9.301 ms
tps = 10525.474721 (without initial connection time)
"""
BASE = bytes(range(256)) * 8


class Stream(io.BytesIO):
    """What is written is kept apart from what is read."""

    def __init__(self, answers: bytes) -> None:
        super().__init__(answers)
        self.written = b""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.written += data
        return len(data)


def usage(**swapped: int) -> Usage:
    return Usage(2.0, 0.5, 0.25, 0.0, 1.0, DiskCounters(1, 4096, 2, 8192), swapped)


def test_redis_benchmark_gives_rate_and_percentiles_in_microseconds() -> None:
    assert parse_redis_benchmark(REDIS) == {"rate_per_s": 70921.98, "p50_us": 39.0, "p99_us": 71.0}
    with pytest.raises(ValueError):
        parse_redis_benchmark("Could not connect to Redis\n")


def test_pgbench_gives_transactions_and_their_rate() -> None:
    assert parse_pgbench(PGBENCH) == (63149, {"rate_per_s": 10525.474721})


@pytest.mark.parametrize(
    "wrong", ["", PGBENCH.replace("failed transactions: 0", "failed transactions: 3"), PGBENCH.replace("tps", "")]
)
def test_pgbench_without_figures_or_with_failures_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError):
        parse_pgbench(wrong)


def test_the_newest_postgresql_with_pgbench_is_taken(tmp_path: Path) -> None:
    for version, names in (("9.6", ("postgres", "pgbench")), ("15", ("postgres", "pgbench")), ("17", ("postgres",))):
        (tmp_path / version / "bin").mkdir(parents=True)
        for name in names:
            (tmp_path / version / "bin" / name).touch()
    assert postgres_programs(tmp_path) == tmp_path / "15" / "bin"
    assert postgres_programs(tmp_path / "none") is None


def test_reaped_children_are_not_the_process_itself() -> None:
    assert parse_stat_reaped_s("77 (a (b) c) S 2 0 0 0 -1 0 0 0 0 0 150 50 30 20 20 0 1 0", ticks=100) == 0.5


def test_costs_are_by_the_operation_and_totals_stay() -> None:
    figures = costs(usage(pswpin=20, pswpout=30), 10)
    assert figures["daemon_cpu_us"] == 50_000 and figures["process_cpu_us"] == 100_000
    assert (figures["pages_in"], figures["pages_out"], figures["disk_bytes"]) == (2, 3, 1228.8)
    assert (figures["seconds"], figures["pages_swapped_in"], figures["disk_written_bytes"]) == (2, 20, 8192)


def test_every_limit_is_half_of_the_data_and_whole_pages() -> None:
    for name, data_bytes in SIZES.data_bytes.items():
        assert SIZES.limit_bytes(name) % PAGE_BYTES == 0
        assert 0 <= data_bytes / 2 - SIZES.limit_bytes(name) < PAGE_BYTES


def test_shared_buffers_hold_all_tables_and_pass_the_limit() -> None:
    sizes = Sizes(10, 1000, pgbench_scale=2, lines=10, line_bytes=100, compilers=1, seconds=1)
    assert sizes.shared_buffers_bytes == 51 * MIB > sizes.data_bytes["pgbench"] == 34 * MIB
    assert sizes.swap_bytes == 4 * sizes.data_bytes["compile"]


def test_lines_are_in_order_and_of_one_length() -> None:
    lines = sorted_lines(300, 120)
    assert lines == sorted(lines) and len(set(lines)) == 300
    assert {len(line) for line in lines} == {120} == {line.index(b"\n") + 1 for line in lines}


def test_requests_are_as_redis_reads_them() -> None:
    assert redis_request([b"GET", redis_key(7)]) == b"*2\r\n$3\r\nGET\r\n$16\r\nkey:000000000007\r\n"


def test_values_of_neighbours_differ_and_are_of_one_length() -> None:
    client = RedisClient(Stream(b""), BASE, 100)
    assert len({client.value(number) for number in range(50)}) > 40
    assert {len(client.value(number)) for number in range(50)} == {100}


def test_fill_sets_every_key_once() -> None:
    stream = Stream(b"+OK\r\n" * 300)
    RedisClient(stream, BASE, 10).fill(300)
    assert all(stream.written.count(redis_key(number)) == 1 for number in range(300))


def test_verify_notices_another_value_and_a_server_that_went_away() -> None:
    value = RedisClient(Stream(b""), BASE, 10).value(3)
    RedisClient(Stream(b"$10\r\n%s\r\n" % value), BASE, 10).verify([3])
    with pytest.raises(WrongBytes):
        RedisClient(Stream(b"$10\r\n%s\r\n" % bytes(10)), BASE, 10).verify([3])
    with pytest.raises(EOFError):
        RedisClient(Stream(b"$10\r\n"), BASE, 10).verify([3])


def test_the_table_has_a_row_for_what_was_measured_and_a_column_for_each_contender() -> None:
    samples = [Sample(number, "tmemfs", "real-sort", {"seconds": seconds}) for number, seconds in enumerate((3.0, 9.0, 5.0))]
    samples += [Sample(0, "plain", "real-redis", {"rate_per_s": 12345.6}), Sample(0, "zram-lz4", "ram", {"p50_us": 1.0})]
    table = goals.real_table(samples).splitlines()
    assert table[0] == "| real programs | tmemfs | plain |"
    assert table[2:] == ["| redis, GET/s | - | 12,346 |", "| sort, s | 5.00 | - |"]


def test_every_row_of_the_table_is_another() -> None:
    assert (
        len({(work, figure) for work, figure, _ in goals.REAL_ROWS})
        == len({text for *_, text in goals.REAL_ROWS})
        == len(goals.REAL_ROWS)
    )
