"""Workers that are killed, crash, loop and hang under a mount: the next one takes over, and no byte is lost.

Each test runs in both ways: the kernel hands out again what was not answered, or it is found in the shared buffers.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.examples import FACTOR
from tests.faulty_worker import SWAP_BYTES
from tests.mounted import Place
from tests.parts import page_of
from tests.waiting import HANG_S, wait_until
from tmemfs.system import runtime, swapdev
from tmemfs.system.memory import punch
from tmemfs.system.status_region import State, StatusRegion, Word
from tmemfs.units import PAGE_BYTES

pytestmark = pytest.mark.fuse
SLOTS = SWAP_BYTES // PAGE_BYTES
#: Beyond the kernel's requests under way and the buffers for what waits.
WRITERS = 14
EVERY_WAY = pytest.mark.parametrize("way", [[], ["old-kernel"]], ids=["resent", "kept"])


class Daemon:
    """A daemon with faulty workers at `place`."""

    def __init__(self, place: Place, process: subprocess.Popen[str]) -> None:
        self.place = place
        self.process = process
        self.status = StatusRegion(os.open(runtime.status_path(place.mountpoint), os.O_RDWR))

    @property
    def worker(self) -> int:
        """The worker's process, once it serves."""
        wait_until(lambda: self[Word.WORKER_PID] and self[Word.IS_SERVING])
        return self[Word.WORKER_PID]

    def __getitem__(self, word: Word) -> int:
        return self.status.words[word]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Kill the worker, and wait until the next one serves."""
        generation = self[Word.GENERATION]
        os.kill(self.worker, number)
        self.await_successor(generation)

    def await_successor(self, generation: int) -> None:
        """Wait until a later worker than `generation` serves."""
        wait_until(lambda: self[Word.GENERATION] > generation and self[Word.IS_SERVING])

    @property
    def log(self) -> str:
        """What was logged so far."""
        return self.place.log.read_text()


@contextmanager
def daemon(directory: Path, *faults: str) -> Iterator[Daemon]:
    """A daemon whose workers have `faults`."""
    place = Place(directory)
    place.mountpoint.mkdir()
    command = [sys.executable, "-m", "tests.faulty_worker", str(directory), *faults]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n", place.log.read_text()
            yield Daemon(place, process)
        finally:
            deadline = time.monotonic() + HANG_S / 4
            while process.poll() is None and time.monotonic() < deadline:
                with suppress(OSError):
                    swapdev.unmount(place.mountpoint)
                time.sleep(0.02)
            process.kill()
            with suppress(OSError):
                swapdev.unmount(place.mountpoint, lazy=True)


@contextmanager
def image(place: Place) -> Iterator[int]:
    """The image, opened for direct I/O."""
    fd = os.open(place.image, os.O_RDWR)
    try:
        yield fd
    finally:
        with suppress(OSError):  # of a mount that answers errors
            os.close(fd)


def write(fd: int, slot: int, seed: int) -> None:
    assert os.pwrite(fd, page_of("half", seed), slot * PAGE_BYTES) == PAGE_BYTES


def has(fd: int, slot: int, seed: int) -> bool:
    return os.pread(fd, PAGE_BYTES, slot * PAGE_BYTES) == page_of("half", seed)


class Load:
    """Threads that each write, read and discard slots of their own, and know what those hold."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.rounds = 0
        self.is_over = False
        self.errors: list[str] = []
        self.threads = [threading.Thread(target=self._run, args=(number,)) for number in range(WRITERS)]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over = True
        for thread in self.threads:
            thread.join(HANG_S)
        assert not any(thread.is_alive() for thread in self.threads), "a process waits for ever"
        assert not self.errors, self.errors[:3]

    def _run(self, number: int) -> None:
        chance, held = random.Random(number), dict[int, int]()
        slots = range(number, SLOTS, WRITERS)
        try:
            while not self.is_over:
                self._step(chance, slots, held)
            for slot, seed in held.items():
                self._verify(slot, seed)
        except Exception as error:
            self.errors.append(repr(error))

    def _step(self, chance: random.Random, slots: range, held: dict[int, int]) -> None:
        slot = chance.choice(slots)
        if chance.random() < 0.6:
            held[slot] = chance.randrange(1, 1 << 20)
            write(self.fd, slot, held[slot])
        elif chance.random() < 0.1:
            held.pop(slot, None)
            discard(self.fd, slot)
            assert os.pread(self.fd, PAGE_BYTES, slot * PAGE_BYTES) == bytes(PAGE_BYTES), f"slot {slot} was discarded"
        elif held:
            slot = chance.choice(list(held))
            self._verify(slot, held[slot])
        self.rounds += 1

    def _verify(self, slot: int, seed: int) -> None:
        assert has(self.fd, slot, seed), f"slot {slot} does not hold what was written"


def discard(fd: int, slot: int) -> None:
    punch(fd, slot * PAGE_BYTES, PAGE_BYTES)


@EVERY_WAY
def test_kills_under_load_lose_nothing(tmp_path: Path, way: list[str]) -> None:
    """The pool is a fraction of what is written, and the tier slow: stores wait for frames when the worker is killed."""
    chance = random.Random(3)
    with daemon(tmp_path, *way, "slow-tier=0.02") as served, image(served.place) as fd, Load(fd) as load:
        for _ in range(10 * FACTOR):
            before = load.rounds
            wait_until(lambda before=before: load.rounds > before + chance.randrange(300))  # type: ignore[misc]
            served.kill()
        assert served[Word.DEATHS_KILLED] == 10 * FACTOR
    assert served.process.returncode == 0


@EVERY_WAY
def test_a_write_that_workers_die_of_is_refused_at_the_third_time(tmp_path: Path, way: list[str]) -> None:
    with daemon(tmp_path, *way, "crash-write=7") as served, image(served.place) as fd:
        write(fd, 6, 1)
        with pytest.raises(OSError) as failed:
            write(fd, 7, 2)
        assert failed.value.errno == errno.EIO
        assert has(fd, 6, 1) and served[Word.DEATHS_CRASHED] == 2
        assert served.place.number("poisoned_requests") == 1
        wait_until(lambda: "ended 2 workers and is refused" in served.log)
        wait_until(lambda: "Fatal Python error: Aborted" in served.log)  # where it crashed


# Kept requests are taken up by another way than the one that crashes here.
@pytest.mark.parametrize("way", [[]], ids=["resent"])
def test_a_load_that_workers_die_of_is_refused_at_the_third_time(tmp_path: Path, way: list[str]) -> None:
    with daemon(tmp_path, *way, "crash-load=7") as served, image(served.place) as fd:
        for slot in range(16):
            write(fd, slot, slot)
        served.place.write("shrink", "all")
        with pytest.raises(OSError) as failed:
            os.pread(fd, PAGE_BYTES, 7 * PAGE_BYTES)
        assert failed.value.errno == errno.EIO
        assert all(has(fd, slot, slot) for slot in range(16) if slot != 7)
        assert served[Word.DEATHS_CRASHED] == 2 and served.place.number("poisoned_requests") == 1


@EVERY_WAY
def test_a_kill_from_outside_is_nothing_against_a_request(tmp_path: Path, way: list[str]) -> None:
    tier = tmp_path / "hangs"
    with daemon(tmp_path, *way, f"tier={tier}") as served, image(served.place) as fd:
        write(fd, 7, 7)
        served.place.write("shrink", "all")
        tier.touch()
        found: list[bool] = []
        reader = threading.Thread(target=lambda: found.append(has(fd, 7, 7)))
        reader.start()
        for _ in range(4):
            wait_until(lambda: served[Word.TIER_BEGUN] > served[Word.TIER_ENDED])
            served.kill()
        tier.unlink()
        reader.join(HANG_S)
        assert found == [True] and not served.place.number("poisoned_requests")


@EVERY_WAY
def test_workers_that_crash_one_after_the_other_end_the_restarts(tmp_path: Path, way: list[str]) -> None:
    with daemon(tmp_path, *way, "crash-again") as served, image(served.place) as fd:
        write(fd, 1, 1)
        os.kill(served.worker, signal.SIGKILL)
        for operation in (lambda: os.pread(fd, PAGE_BYTES, PAGE_BYTES), lambda: write(fd, 2, 2)):
            with pytest.raises(OSError) as failed:
                operation()
            assert failed.value.errno == errno.EIO
        assert served[Word.STATE] == State.GAVE_UP and served[Word.DEATHS] == 5 + 1
        wait_until(lambda: "the mount answers errors from now on" in served.log)
        served.process.send_signal(signal.SIGTERM)  # the image is open, so nothing is unmounted
        with pytest.raises(OSError):
            os.pread(fd, PAGE_BYTES, PAGE_BYTES)
    assert served.process.returncode == 0 and not swapdev.is_mounted(served.place.mountpoint)


@EVERY_WAY
def test_idle_workers_may_be_killed_as_often_as_anybody_likes(tmp_path: Path, way: list[str]) -> None:
    with daemon(tmp_path, *way) as served, image(served.place) as fd:
        write(fd, 1, 1)
        for _ in range(10):
            served.kill()
        assert has(fd, 1, 1) and served[Word.STATE] == State.SERVING and len(os.listdir(f"/proc/{served.process.pid}/fd")) < 40


@EVERY_WAY
def test_workers_may_be_killed_while_they_recover(tmp_path: Path, way: list[str]) -> None:
    with daemon(tmp_path, *way) as served, image(served.place) as fd:
        write(fd, 1, 1)
        for _ in range(4):
            pid = served[Word.WORKER_PID]
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: served[Word.WORKER_PID] not in (0, pid))  # type: ignore[misc]
        assert has(fd, 1, 1) and served[Word.STATE] == State.SERVING


def test_a_process_that_is_stopped_is_replaced_and_says_where_it_was(tmp_path: Path) -> None:
    with daemon(tmp_path, "watchdog=0.4") as served, image(served.place) as fd:
        write(fd, 1, 1)
        generation = served[Word.GENERATION]
        os.kill(served.worker, signal.SIGSTOP)
        assert has(fd, 1, 1)
        served.await_successor(generation)
        assert served[Word.DEATHS_HUNG] == 1
        wait_until(lambda: "where the last worker was" in served.log and "page_path.py" in served.log)


@EVERY_WAY
def test_a_page_path_that_loops_is_replaced(tmp_path: Path, way: list[str]) -> None:
    with daemon(tmp_path, *way, "watchdog=0.4", "loop-write=7") as served, image(served.place) as fd:
        write(fd, 1, 1)
        with pytest.raises(OSError):
            write(fd, 7, 7)
        assert served[Word.DEATHS_HUNG] == 2 and has(fd, 1, 1)


def test_one_that_loops_is_found_out_also_after_a_kill_that_hit_the_tier(tmp_path: Path) -> None:
    """The calls that it took with it are not those that the next one waits for."""
    tier = tmp_path / "hangs"
    with daemon(tmp_path, "watchdog=0.4", "loop-write=7", f"tier={tier}") as served, image(served.place) as fd:
        write(fd, 1, 1)
        served.place.write("shrink", "all")
        tier.touch()
        reader = threading.Thread(target=os.pread, args=(fd, PAGE_BYTES, PAGE_BYTES))
        reader.start()
        wait_until(lambda: served[Word.TIER_BEGUN] > served[Word.TIER_ENDED])
        served.kill()
        tier.unlink()
        reader.join(HANG_S)
        with pytest.raises(OSError):
            write(fd, 7, 7)
        assert served[Word.DEATHS_HUNG] == 2


def test_a_tier_that_does_not_answer_is_no_reason_to_kill(tmp_path: Path) -> None:
    tier = tmp_path / "hangs"
    with daemon(tmp_path, "watchdog=2", f"tier={tier}") as served, image(served.place) as fd:
        write(fd, 1, 1)
        served.place.write("shrink", "all")
        tier.touch()
        reader = threading.Thread(target=os.pread, args=(fd, PAGE_BYTES, PAGE_BYTES))
        reader.start()
        wait_until(lambda: served[Word.TIER_BEGUN] > served[Word.TIER_ENDED])
        pulse = served[Word.PULSE]
        wait_until(lambda: served[Word.PULSE] >= pulse + 4)  # a second each
        assert not served[Word.DEATHS]
        tier.unlink()
        reader.join(HANG_S)


def test_an_event_loop_that_hangs_while_pages_are_answered_is_no_reason_to_kill(tmp_path: Path) -> None:
    file = tmp_path / "hangs"
    with daemon(tmp_path, "watchdog=0.2", f"event-loop={file}") as served, image(served.place) as fd:
        write(fd, 1, 1)
        file.touch()
        pulse = served[Word.PULSE]
        until = time.monotonic() + 3
        while time.monotonic() < until:
            assert has(fd, 1, 1)
        assert served[Word.PULSE] <= pulse + 1 and not served[Word.DEATHS]
        file.unlink()


@EVERY_WAY
def test_a_signal_while_a_worker_is_replaced_is_obeyed_by_the_next(tmp_path: Path, way: list[str]) -> None:
    with daemon(tmp_path, *way) as served:
        os.kill(served.worker, signal.SIGKILL)
        for _ in range(20):
            served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(HANG_S) == 0
    assert not swapdev.is_mounted(served.place.mountpoint)


def write_and_read(fd: int, seed: int) -> bool:
    write(fd, 5, seed)
    return has(fd, 5, seed)


def discard_and_read(fd: int, seed: int) -> bool:
    discard(fd, 5)
    return os.pread(fd, PAGE_BYTES, 5 * PAGE_BYTES) == bytes(PAGE_BYTES)


def read_cluster(fd: int, seed: int) -> bool:
    return os.pread(fd, 8 * PAGE_BYTES, 0)[PAGE_BYTES : 2 * PAGE_BYTES] == page_of("half", 1)


OPERATIONS: dict[str, Callable[[int, int], bool]] = {"write": write_and_read, "discard": discard_and_read, "cluster": read_cluster}


@EVERY_WAY
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_worker_may_die_at_any_line_of_the_page_path(tmp_path: Path, way: list[str], name: str) -> None:
    """Each second worker dies before a line, and the others are killed after the request has been answered."""
    with daemon(tmp_path, *way, "lines") as served, image(served.place) as fd:
        for slot in range(8):
            write(fd, slot, slot)
        for seed in range(8 * FACTOR):
            served.kill()  # the next one dies of the request, at a line
            generation = served[Word.GENERATION]
            assert generation % 2 == 0
            assert OPERATIONS[name](fd, seed)
            if served[Word.GENERATION] == generation:
                served.kill()
            else:
                served.await_successor(generation)
            assert all(has(fd, slot, slot) for slot in range(8) if slot != 5)
        assert served[Word.STATE] == State.SERVING
