"""A machine that swaps on tmemfs, for real: hogs in memory cgroups that verify every byte, and every way up, down and out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.mounted import Place, mounted, place_for, swap_up, tmemfs
from tests.waiting import HANG_S, wait_until
from tmemfs.system import swapdev
from tmemfs.units import GIB, MIB, PAGE_BYTES
from tools.bench import plain_fuse
from tools.cgroup import MemoryCgroup

pytestmark = pytest.mark.system

#: What the kernel discards at once.
CLUSTER_PAGES = 512
#: Ends a program that hangs; a busy machine is many times slower than an idle one.
LONG_S = 3 * HANG_S
HOG = (sys.executable, str(Path(__file__).parents[2] / "tools" / "hog.py"))


@contextmanager
def meanwhile(task: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call `task` again and again in a thread; its failure fails the test."""
    end, failures = threading.Event(), list[BaseException]()

    def run() -> None:
        while not end.wait(every_s):
            try:
                task()
            except BaseException as error:
                failures.append(error)
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
    assert not failures, failures


@contextmanager
def limited(name: str, limit: str) -> Iterator[MemoryCgroup]:
    with MemoryCgroup(name, int(limit.removesuffix("M")) * MIB) as cgroup:
        yield cgroup


def hog(cgroup: MemoryCgroup, size: str, rounds: int, timeout_s: float = LONG_S) -> dict[str, Any]:
    """Run a hog to its end; what it measured."""
    command = [*HOG, "--size", size, "--rounds", str(rounds), "--tasks", str(cgroup.tasks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["wrong"] == 0
    return answer


def shrink_now(place: Place, size: str) -> None:
    with suppress(BlockingIOError):  # less was there than asked for
        place.write("shrink", size)


@pytest.mark.timeout(2 * LONG_S)
def test_a_hog_of_1_gib_in_256_mib_comes_back_right_while_the_pool_shrinks(tmp_path: Path) -> None:
    with swap_up(tmp_path) as place, limited("right", "256M") as cgroup:
        stores = 0

        def shrink_a_quarter() -> None:  # by progress and not by the clock: a slow machine does the same work
            nonlocal stores
            if (now := place.number("stores")) > stores + 10_000:
                shrink_now(place, str(place.number("pool_current") // 4))
                stores = now

        with meanwhile(shrink_a_quarter, 0.05):
            hog(cgroup, "1G", rounds=2)
        stat = place.flat()
        assert int(stat["loads_ram"]) > 10_000 and int(stat["loads_disk"]) > 10_000
        assert int(stat["pages_written"]) > 10_000
        events = place.flat("events")
        assert {events[key] for key in ("stores_refused", "corrupt_records", "read_errors", "write_errors")} == {"0"}
        assert place.state == "running"


def test_the_limit_of_the_pool_is_never_passed(tmp_path: Path) -> None:
    limit = 64 * MIB
    with swap_up(tmp_path, pool_max="64M") as place, limited("limit", "64M") as cgroup:
        resident = place.number("resident_shmem") - place.number("pool_resident")
        seen: list[tuple[int, int, int]] = []

        def sample() -> None:
            stat = place.flat()
            seen.append((int(stat["pool_current"]), int(stat["pool_resident"]), int(stat["resident_shmem"]) - resident))

        while len(seen) <= 50:
            with meanwhile(sample, 0.02):
                hog(cgroup, "256M", rounds=1)
        assert max(current for current, _, _ in seen) > limit // 2
        assert max(max(sampled) for sampled in seen) <= limit
        assert int(place.read("pool.peak")) <= limit


def test_a_dead_hog_leaves_nothing_behind(tmp_path: Path) -> None:
    with swap_up(tmp_path) as place, limited("dead", "64M") as cgroup:
        hog(cgroup, "256M", rounds=0)
        cgroup.reclaim()  # one page left in the swap cache keeps its whole cluster from being discarded
        [device] = swapdev.loop_devices_of(place.image)

        def kept() -> int:  # pages of clusters that are not free: discards come by the cluster
            entry = swapdev.swap_on_device(device)
            assert entry is not None
            return entry.used_bytes // PAGE_BYTES * CLUSTER_PAGES

        wait_until(lambda: place.number("pages_stored") - kept() < 1000)
        wait_until(lambda: place.number("pool_resident") - kept() * PAGE_BYTES <= 10 * MIB)


def test_what_a_hog_of_1_gib_stored_is_given_back_in_less_than_half_the_time_that_it_took_to_store(tmp_path: Path) -> None:
    with swap_up(tmp_path, pool_max="128M") as place, limited("ended", "128M") as cgroup:

        def taken() -> int:
            return place.number("pool_resident") + place.backing.stat().st_blocks * 512

        before = taken()
        stored_s = GIB / 1e6 / hog(cgroup, "1G", rounds=0)["fill_mb_per_s"]
        ended = time.monotonic()
        assert place.number("pages_written") > 10_000
        cgroup.reclaim()
        # what the kernel still keeps, it has not discarded: a page in its swap cache keeps a whole cluster
        wait_until(lambda: taken() - before - place.number("compressed_bytes") < 0.02 * GIB)
        given_back_s = time.monotonic() - ended
        print(f"stored in {stored_s:.2f} s, given back in {given_back_s:.2f} s")
        assert given_back_s < stored_s / 2


def test_fio_verifies_what_it_wrote_to_the_loop_device(tmp_path: Path) -> None:
    with mounted(tmp_path, size="256M", pool_max="32M") as place:
        device = swapdev.attach(place.image)
        command = ["fio", "--name=verify", f"--filename={device}", "--size=192M", "--rw=randwrite", "--bsrange=4k-128k",
                   "--direct=1", "--ioengine=libaio", "--iodepth=8", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
                   "--buffer_compress_percentage=50", "--refill_buffers", "--output-format=json"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONG_S, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout)["jobs"][0]["error"] == 0
        assert place.number("loads_disk") > 1000
        assert place.number("pool_peak") <= 32 * MIB


def test_stress_ng_verifies_its_memory(tmp_path: Path) -> None:
    with swap_up(tmp_path, pool_max="64M") as place, limited("stress", "96M") as cgroup:
        inside = f"echo $$ > {cgroup.tasks}; exec stress-ng --vm 2 --vm-bytes 256M --vm-keep --verify --timeout 20s --metrics-brief"
        with meanwhile(lambda: shrink_now(place, "8M"), 0.5):
            while place.number("stores") <= 10_000:
                done = subprocess.run(["sh", "-c", inside], capture_output=True, text=True, timeout=LONG_S, check=False)
                assert done.returncode == 0, done.stdout + done.stderr
        assert place.flat("events")["corrupt_records"] == "0"


def test_the_contender_without_the_relay_swaps_too(tmp_path: Path) -> None:
    with plain_fuse.mounted(tmp_path, "mnt", 1 << 30, "32M") as mount, limited("plain", "48M") as cgroup:
        swapdev.make_swap(mount.device)
        swapdev.swap_on(mount.device, 100)
        try:
            hog(cgroup, "128M", rounds=1)
            assert int(mount.stat()["loads_disk"]) + int(mount.stat()["loads_ram"]) > 1000
        finally:
            swapdev.swap_off(mount.device)


def test_up_and_down_can_be_said_twice(tmp_path: Path) -> None:
    with swap_up(tmp_path) as place:
        [device] = swapdev.loop_devices_of(place.image)
        entry = swapdev.swap_on_device(device)
        assert entry is not None and entry.priority == 100 and entry.size_bytes > 4095 * MIB
        again = tmemfs("up", *place.options)
        assert "already up" in again.stdout and "Try next" in again.stdout
        assert swapdev.loop_devices_of(place.image) == [device]
        assert "down" in tmemfs("down", place.mountpoint).stdout
        assert swapdev.swap_on_device(device) is None and not swapdev.is_mounted(place.mountpoint)
        assert "nothing is up" in tmemfs("down", place.mountpoint).stdout
        assert place.backing.stat().st_blocks * 512 <= MIB


def test_up_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    with mounted(tmp_path, size="1G") as place:
        assert "swap is on now" in tmemfs("up", *place.options).stdout
        assert any(swapdev.swap_on_device(device) for device in swapdev.loop_devices_of(place.image))
        tmemfs("down", place.mountpoint)


def test_an_up_that_fails_leaves_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.mountpoint.mkdir()
    try:
        done = tmemfs("up", *place.options, "--size", "8K", check=False)
        assert done.returncode == 2 and "mkswap" in done.stderr
        assert not swapdev.is_mounted(place.mountpoint) and not swapdev.loop_devices_of(place.image)
    finally:
        place.end()


def test_umount_refuses_while_the_image_is_used(tmp_path: Path) -> None:
    with swap_up(tmp_path) as place:
        done = tmemfs("umount", place.mountpoint, check=False)
        assert done.returncode == 2 and "uses the image: run 'tmemfs down" in done.stderr
        assert place.state == "running"


def test_sigterm_is_refused_while_the_swap_is_on_and_obeyed_after(tmp_path: Path) -> None:
    with swap_up(tmp_path) as place:
        os.kill(place.pid, signal.SIGTERM)
        wait_until(lambda: "SIGTERM: not stopping" in place.log.read_text())
        assert place.state == "running"
        for device in swapdev.loop_devices_of(place.image):
            swapdev.swap_off(device)
            swapdev.detach(device)
        wait_until(lambda: not swapdev.loop_devices_of(place.image))
        os.kill(place.pid, signal.SIGTERM)
        wait_until(lambda: not swapdev.is_mounted(place.mountpoint))


def test_down_cleans_up_after_a_daemon_that_was_killed(tmp_path: Path) -> None:
    with swap_up(tmp_path) as place:
        pid = place.pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: swapdev.mount_is_dead(place.mountpoint))
        done = tmemfs("stat", place.mountpoint, check=False)
        assert done.returncode == 2 and "has gone: run 'tmemfs down" in done.stderr
        assert "cleaned up" in tmemfs("down", place.mountpoint).stdout
        assert not swapdev.is_mounted(place.mountpoint) and not swapdev.loop_devices_of(place.image)
        assert "up" in tmemfs("up", *place.options).stdout


def test_a_backing_that_fills_up_degrades_and_recovers(tmp_path: Path) -> None:
    with swap_up(tmp_path, "--backing-max", "16M", pool_max="32M") as place, limited("full", "64M") as cgroup:
        command = [*HOG, "--size", "512M", "--rounds", "0", "--tasks", str(cgroup.tasks)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: place.state.startswith("degraded: the backing is full"))
            assert place.number("backing_current") <= 16 * MIB
        finally:
            process.kill()
            process.wait(HANG_S)
        place.write("backing.max", "max")
        wait_until(lambda: place.state == "running")
        hog(cgroup, "160M", rounds=1)


def test_the_daemon_stays_small(tmp_path: Path) -> None:
    with swap_up(tmp_path, pool_max="64M") as place, limited("small", "64M") as cgroup:
        hog(cgroup, "128M", rounds=1)
        stat = {key: int(value) for key, value in place.flat().items() if value.isdigit()}
        # What supervisor and worker share counts once.
        shares = proportional_bytes(stat["daemon_pid"]) + proportional_bytes(stat["worker_pid"])
        beyond = shares - stat["pool_resident"] - stat["table_bytes"]
        # The goal is 60 MB, and is missed by 2 (docs/benchmarks.md): it must not become more.
        assert beyond < 64_000_000, beyond


def proportional_bytes(pid: int) -> int:
    """The memory of a process; what n processes have mapped counts 1/n."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def test_the_foreground_daemon_notifies_its_supervisor(tmp_path: Path) -> None:
    import socket

    place = Place(tmp_path)
    place.mountpoint.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.settimeout(HANG_S)
        process = subprocess.Popen(
            [sys.executable, "-m", "tmemfs", "mount", "--foreground", *map(str, place.options), "--size", "64M"],
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert supervisor.recv(100) == b"READY=1"
            assert place.state == "running"
            process.terminate()
            assert supervisor.recv(100) == b"STOPPING=1"
            assert process.wait(HANG_S) == 0
        finally:
            place.end()
            process.kill()


def test_an_idle_daemon_is_quiet(tmp_path: Path) -> None:
    """There is a time in which no thread of it wakes up. It looks at the machine when the kernel tells of a stall, which it counts,
    so a time in which it did says nothing."""
    with place_for("up", tmp_path, "--size", "1G") as place:
        tasks = Path(f"/proc/{place.pid}/task")

        def switches() -> int:
            lines = [line for task in tasks.iterdir() for line in (task / "status").read_text().splitlines()]
            return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt"))

        def counted() -> tuple[str, str]:
            stat = place.flat()
            return stat["requests"], stat["pressure_samples"]

        def is_quiet() -> bool:
            reasons, before = counted(), switches()
            time.sleep(2)
            woken = switches() - before
            time.sleep(0.5)  # what woke it may not have been counted yet
            return counted() == reasons and woken <= 2

        wait_until(is_quiet)
