"""Up and down in every order, several at once, by other paths than the mountpoint, and with memory that does not come back."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.mounted import TMEMFS, Place, mounted, place_for, swap_up, tmemfs, wait_until
from tests.waiting import HANG_S
from tmemfs.system import runtime, swapdev
from tmemfs.units import MIB
from tools.cgroup import MemoryCgroup

pytestmark = pytest.mark.system

#: `TMEMFS_ROUNDS=200 TMEMFS_SEED=1 pytest tests/system/test_lifecycle.py -k parallel` is the whole of it.
ROUNDS: Final = int(os.environ.get("TMEMFS_ROUNDS", "8"))
SEED: Final = int(os.environ.get("TMEMFS_SEED", "1"))

#: Fills memory, says so, waits for a line, and looks whether it still is what it was.
HOLDER = """
import sys
pages = [bytes([number % 251]) * 2048 + number.to_bytes(2048, "little") for number in range(int(sys.argv[1]))]
print("filled", flush=True)
sys.stdin.readline()
assert all(page == bytes([at % 251]) * 2048 + at.to_bytes(2048, "little") for at, page in enumerate(pages))
"""


def started(*arguments: str | Path) -> subprocess.Popen[str]:
    """The command, running."""
    return subprocess.Popen(
        [*TMEMFS, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code of the command, and all that it said."""
    out, err = process.communicate(timeout=HANG_S)
    assert "Traceback" not in err and "bug in tmemfs" not in err, err
    return process.returncode, out + err


@contextmanager
def holding(cgroup: MemoryCgroup, size_bytes: int) -> Iterator[subprocess.Popen[str]]:
    """A process in `cgroup` that holds so much, and fails if it is not what it was. A line on its stdin ends it."""
    command = f"echo $$ > {cgroup.tasks}; exec {sys.executable} -c '{HOLDER}' {size_bytes // 4096}"
    process = subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "filled\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=HANG_S)


def is_whole(process: subprocess.Popen[str]) -> bool:
    """Whether what a holder holds is what it was."""
    process.communicate("\n", timeout=HANG_S)
    return process.returncode == 0


def swaps_of(place: Place) -> list[str]:
    """Loop devices over the image that are on as swap."""
    return [device for device in swapdev.loop_devices_of(place.image) if swapdev.swap_on_device(device)]


def test_ups_at_once_turn_one_swap_on(tmp_path: Path) -> None:
    with mounted(tmp_path, size="1G") as place:
        answers = [ended(process) for process in [started("up", place.mountpoint) for _ in range(4)]]
        assert [code for code, _ in answers] == [0] * 4, answers
        assert sorted("already up" in said for _, said in answers) == [False, True, True, True]
        assert len(swapdev.loop_devices_of(place.image)) == 1 == len(swaps_of(place))


COMMANDS: Final = ("up", "up", "up", "down", "down", "mount", "mount", "umount", "shrink", "stat")


def test_whatever_is_run_in_parallel_one_image_is_in_use_once(tmp_path: Path) -> None:
    place, chance, done = Place(tmp_path), random.Random(SEED), dict[str, int]()
    place.mountpoint.mkdir()
    arguments: dict[str, list[str | Path]] = {
        "up": ["up", *place.options, "--size", "64M", "--pool-max", "32M"],
        "mount": ["mount", *place.options, "--size", "64M", "--pool-max", "32M"],
        "down": ["down", place.mountpoint],
        "umount": ["umount", place.mountpoint],
        "shrink": ["shrink", "all", "--mountpoint", place.mountpoint],
        "stat": ["stat", place.mountpoint],
    }
    try:
        for round_number in range(ROUNDS):
            chosen = chance.choices(COMMANDS, k=chance.randint(2, 5))
            answers = [(name, *ended(process)) for name, process in [(name, started(*arguments[name])) for name in chosen]]
            for name, code, said in answers:
                # one waits for the other, so no step of theirs ever fails, and nothing stands in the way of up and down
                assert code == 0 or name not in ("up", "down"), (round_number, name, said)
                assert code in (0, 1, 2) and "failed (" not in said, (round_number, name, said)
                done[f"{name} {code}"] = done.get(f"{name} {code}", 0) + 1
            consistent(place, (round_number, answers))
        print(f"seed {SEED}, {ROUNDS} rounds:", dict(sorted(done.items())))
    finally:
        tmemfs("down", place.mountpoint, check=False)
        place.end()


def consistent(place: Place, why: object) -> None:
    """One mount at most, one loop device, one swap; what is recorded is what is there, and the command says so too."""
    mounts = [mount for mount in swapdev.mounts() if mount.mountpoint == str(place.mountpoint)]
    devices, swaps, record = swapdev.loop_devices_of(place.image), swaps_of(place), runtime.read_record(place.mountpoint)
    assert len(mounts) <= 1 and len(devices) <= len(mounts) and swaps == devices, why
    assert (record is not None and record.daemon_lives) == bool(mounts), why
    assert (record.loop if record else "") in ("", *devices), why
    code, said = ended(started("stat", place.mountpoint))
    assert (code, "nothing is mounted" in said) == ((0, False) if mounts else (2, True)), (why, said)


def test_an_up_with_other_options_is_refused_and_names_them(tmp_path: Path) -> None:
    with swap_up(tmp_path, "--codec", "lz4", size="1G", pool_max="64M") as place:
        same = ["--size", "1024M", "--pool-max", "64M", "--codec", "lz4", "--backing-max", "max"]
        assert "already up" in tmemfs("up", *place.options, *same, "--priority", "100").stdout
        files = {"backing none": place.backing, "log /x": place.log}
        figures = {"size 4K": "1 GiB", "pool-max 1G": "64 MiB", "priority 3": "100", "backing-max 1G": ""}
        for expected in (files, figures, {"codec zstd": "lz4", "encrypt off": "on"}):
            other = [word for given in expected for word in f"--{given}".split()]
            done = tmemfs("up", place.mountpoint, *other, check=False)
            assert done.returncode == 2 and done.stdout == ""
            for given, now in expected.items():
                assert f"--{given} was given, and it is {now}" in done.stderr
        assert swapdev.swap_entries() and place.read("codec").startswith("[lz4]")
        done = tmemfs("up", place.mountpoint, "--codec", "zlib", check=False)
        assert done.returncode == 2 and "choose lz4, zstd" in done.stderr


@pytest.mark.parametrize("killed", [False, True])
def test_a_swap_whose_mount_was_detached_is_found_and_taken_down(tmp_path: Path, killed: bool) -> None:
    with swap_up(tmp_path) as place:
        pid, [device] = place.pid, swaps_of(place)
        swapdev.unmount(place.mountpoint, lazy=True)
        try:
            assert f"swap is on by {device}" in tmemfs("stat", place.mountpoint, check=False).stderr
            for command in ("up", "mount"):
                done = tmemfs(command, *place.options, check=False)
                assert done.returncode == 2 and "run 'tmemfs down" in done.stderr
            done = tmemfs("umount", place.mountpoint, check=False)
            assert done.returncode == 2 and f"{device} uses the image" in done.stderr
            if killed:
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda: runtime.process_started(pid) is None)
                assert f"swap is on by {device}" in tmemfs("stat", place.mountpoint, check=False).stderr
            said = tmemfs("down", place.mountpoint).stdout
            assert ("cleaned up" if killed else ": down") in said
            assert swapdev.swap_on_device(device) is None
            assert device not in [loop.device for loop in swapdev.loop_devices()]
            assert runtime.process_started(pid) is None and runtime.read_record(place.mountpoint) is None
        finally:
            if swapdev.swap_on_device(device):
                swapdev.swap_off(device)
                swapdev.detach(device)


def test_a_swap_is_found_and_taken_down_from_a_namespace_without_its_mount(tmp_path: Path) -> None:
    with swap_up(tmp_path) as place:
        pid = place.pid

        def without_the_mount(command: str) -> subprocess.CompletedProcess[str]:
            at = str(place.mountpoint)
            inside = ("unshare", "--mount", "sh", "-c", 'umount "$0" && exec "$@"', at)
            return subprocess.run([*inside, *TMEMFS, command, at], capture_output=True, text=True, timeout=HANG_S)

        stat = without_the_mount("stat")
        assert stat.returncode == 0 and "running" in stat.stdout, stat.stderr
        done = without_the_mount("down")
        assert done.returncode == 0 and done.stdout == f"{place.mountpoint}: down\n", done.stderr
        assert not swapdev.is_mounted(place.mountpoint) and not swapdev.loop_devices_of(place.image)
        assert runtime.process_started(pid) is None


def test_down_of_a_bind_mount_takes_all_down(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with swap_up(tmp_path) as place:
        subprocess.run(["mount", "--bind", place.mountpoint, other], check=True)
        assert "already up" in tmemfs("up", other).stdout
        assert len(swaps_of(place)) == 1
        assert tmemfs("down", other).stdout == f"{place.mountpoint}: down\n"
        assert not swapdev.is_mounted(other) and not swapdev.is_mounted(place.mountpoint)


def test_down_refuses_to_overfill_a_cgroup_and_names_it(tmp_path: Path) -> None:
    with swap_up(tmp_path) as place, MemoryCgroup("overfull", 64 * MIB) as cgroup, holding(cgroup, 192 * MIB) as holder:
        done = tmemfs("down", place.mountpoint, check=False)
        assert done.returncode == 2 and str(cgroup.path) in done.stderr and "limit 64 MiB" in done.stderr, done.stderr
        assert holder.poll() is None and len(swaps_of(place)) == 1
        raise_limit = done.stderr.partition("Raise the limit (")[2].partition(")")[0]
        subprocess.run(["sh", "-c", raise_limit], check=True)
        assert ": down" in tmemfs("down", place.mountpoint).stdout
        assert is_whole(holder)


def test_down_waits_for_a_swapoff_that_is_under_way(tmp_path: Path) -> None:
    with swap_up(tmp_path) as place, MemoryCgroup("waits", 64 * MIB) as cgroup, holding(cgroup, 192 * MIB) as holder:
        [device] = swaps_of(place)
        pid = place.pid
        os.kill(pid, signal.SIGSTOP)  # nothing comes back meanwhile
        try:
            (cgroup.path / ("memory.limit_in_bytes" if cgroup.tasks.name == "tasks" else "memory.max")).write_text("1G")
            other = subprocess.Popen(["swapoff", device], stderr=subprocess.PIPE, text=True)
            # a second one that came first would wait for the daemon, and nothing can end it
            wait_until(lambda: "swapoff" in Path(f"/proc/{other.pid}/stack").read_text())
            down = started("down", place.mountpoint)
            lock = runtime.DIRECTORY / runtime.lock_of(place.mountpoint)
            wait_until(lambda: lock.exists() and f"{down.pid} " in lock.read_text())
        finally:
            os.kill(pid, signal.SIGCONT)
        assert ended(down) == (0, f"{place.mountpoint}: down\n")
        assert (other.communicate(timeout=HANG_S)[1], other.returncode) == ("", 0)
        assert is_whole(holder)


@pytest.mark.parametrize("name", [b"\xff\xfe \n", "a\u2028b\x0cc\u00a0d\x1ce\u0085f".encode()], ids=ascii)
def test_a_mountpoint_may_be_called_anything(tmp_path: Path, name: bytes) -> None:
    directory = tmp_path / os.fsdecode(name)
    directory.mkdir()
    other = directory / "file"
    other.write_bytes(bytes(MIB))
    loop = subprocess.run(["losetup", "--find", "--show", other], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    try:
        with place_for("mount", directory, "--size", "64M", "--pool-max", "32M") as place:
            for command in ("up", "up", "stat"):
                tmemfs(command, place.mountpoint)
            assert tmemfs("down", place.mountpoint).stdout == f"{place.mountpoint}: down\n"
            assert not swapdev.is_mounted(place.mountpoint) and runtime.read_record(place.mountpoint) is None
    finally:
        swapdev.detach(loop)
