"""The two mounts of a run, each with a supervisor and a worker of its own, a prober, and control requests that go on all the time.

`swap` is up as swap. `image` is only mounted; a loop device over its image holds a file system, and the rest of the image belongs
to the prober, which verifies what it wrote there. Both pools are small, so the disk is used all the time.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tmemfs.errors import Refused
from tmemfs.system import swapdev
from tmemfs.units import MIB, PAGE_BYTES
from tools.interrupts import uninterrupted
from tools.kills.phases import Phase
from tools.kills.prober import Prober, Reads, VerifiedWrites
from tools.kills.worker import children_of
from tools.soak.places import HANG_S, Fault, Place

SWAP_BYTES: Final = 2048 * MIB
SWAP_POOL_MAX: Final = "48M"
IMAGE_BYTES: Final = 320 * MIB
IMAGE_POOL_MAX: Final = "32M"
FILE_SYSTEM_BYTES: Final = 288 * MIB
_LOOK_S: Final = 0.002
_SEEN_S: Final = 2.5
#: What a control request may be answered with while workers die: less was possible than asked for, or it was cut short.
_ALLOWED: Final = (errno.EAGAIN, errno.EBUSY, errno.EINTR)
#: What goes on all the time, in random order.
_REQUESTS: Final = (
    ("shrink", "4M"),
    ("shrink", "16M deadline=1s"),
    ("compact", "1.02 deadline=1s"),
    ("recompress", "zstd"),
    ("recompress", "zstd:1"),
    ("pool.max", "{pool_max}"),
)


@dataclass(slots=True)
class Target:
    """A mount whose worker is killed. What its control requests were answered is added to `counts`."""

    place: Place
    supervisor: int
    device: str
    pages: Reads | VerifiedWrites
    prober: Prober
    counts: Counter[str]
    _failed: list[str] = field(default_factory=list)
    _asking: list[threading.Thread] = field(default_factory=list)

    def find_supervisor(self) -> None:
        """Find the supervisor again after an upgrade."""
        self.supervisor = int(self.place.flat("stat")["daemon_pid"])

    def wait_for(self, phase: Phase) -> bool:
        """Have the worker begin `phase`; returns once it is seen (True), or after some time. Raises Fault, OSError."""
        if not phase.moves:
            return False
        before = self.place.flat("stat")
        self.ask(phase.begin)
        deadline = time.monotonic() + _SEEN_S
        while time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            now = self.place.flat("stat")
            if phase.is_seen(before, now):
                return True
            before = now
        return False

    def ask(self, requests: tuple[tuple[str, str], ...]) -> None:
        """Send control requests, one after the other, in a thread: some of them take seconds."""
        self._asking = [thread for thread in self._asking if thread.is_alive()]
        thread = threading.Thread(target=self._ask, args=(requests,), daemon=True)
        self._asking.append(thread)
        thread.start()

    def _ask(self, requests: tuple[tuple[str, str], ...]) -> None:
        for name, value in requests:
            self.request(name, value.format(pool_max=self.place.pool_max))

    def request(self, name: str, value: str) -> None:
        """Send one control request, and count its answer."""
        try:
            self.place.write(name, value)
            self.counts[f"{name} done"] += 1
        except OSError as error:
            number = error.errno or 0
            self.counts[f"{name} {errno.errorcode.get(number, number)}"] += 1
            if number not in _ALLOWED:
                self._failed.append(f"writing {value!r} to control/{name} of {self.place.name}: {error.strerror}")
        except Fault as error:
            self._failed.append(str(error))

    def check(self) -> None:
        """Raise Fault, or Unanswered, if a request of any kind failed."""
        self.prober.check()
        if self._failed:
            raise Fault("; ".join(self._failed))

    def settle(self) -> None:
        """Wait for the answers of all control requests. Raises Fault."""
        deadline = time.monotonic() + HANG_S
        for thread in self._asking:
            thread.join(max(deadline - time.monotonic(), 0.0))
            if thread.is_alive():
                raise Fault(f"a control request to {self.place.name} got no answer within {HANG_S:.0f} s")
        self.check()

    def kill(self) -> None:
        """Kill the supervisor and the worker, so that whatever waits for an answer gets an error."""
        for pid in (self.supervisor, *children_of(self.supervisor)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @contextmanager
    def requests(self, seed: int) -> Iterator[None]:
        """Control requests of all kinds, one after the other, for the block."""
        end, choice = threading.Event(), random.Random(seed)

        def run() -> None:
            while not end.wait(choice.uniform(0.1, 0.6)):
                self._ask((choice.choice(_REQUESTS),))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join(HANG_S / 8)


@contextmanager
def targets(root: Path, seed: int, more: tuple[str, ...], counts: Counter[str]) -> Iterator[tuple[Target, Target]]:
    """Both targets below `root`, mounted with the options `more` too; taken down in any case. Raises Fault, Refused."""
    with ExitStack() as stack:
        swap = Place("swap", root / "swap", str(SWAP_BYTES), SWAP_POOL_MAX, more)
        image = Place("image", root / "image", str(IMAGE_BYTES), IMAGE_POOL_MAX, more)
        for place in (swap, image):
            place.mountpoint.mkdir(parents=True)
            place.store.mkdir()
            # before it is up, which may be interrupted halfway
            stack.callback(place.take_down)
        swap.up()
        code, said = image.command("mount", *image.options)
        if code:
            raise Fault(f"mount of {image.name} ended with {code}: {said}")
        [swap_device] = swapdev.loop_devices_of(swap.mountpoint / "swap")
        image_device = _file_system(image, root / "files", stack)
        loads = Reads(swap.mountpoint / "swap", range(SWAP_BYTES // PAGE_BYTES), seed)
        writes = VerifiedWrites(image.mountpoint / "swap", range(FILE_SYSTEM_BYTES // PAGE_BYTES, IMAGE_BYTES // PAGE_BYTES), seed)
        yield (
            _probed(swap, swap_device, loads, counts, stack),
            _probed(image, image_device, writes, counts, stack),
        )


def _probed(place: Place, device: str, requests: Reads | VerifiedWrites, counts: Counter[str], stack: ExitStack) -> Target:
    stack.callback(requests.close)
    prober = stack.enter_context(Prober(place.name, requests.request))
    return Target(place, int(place.flat("stat")["daemon_pid"]), device, requests, prober, counts)


def _file_system(place: Place, at: Path, stack: ExitStack) -> str:
    """A file system over a part of the image, mounted `at`; returns its loop device."""
    with uninterrupted():
        device = swapdev.attach(place.mountpoint / "swap")
        stack.callback(_detach, device)
    run("mkfs.ext4", "-q", "-F", device, f"{FILE_SYSTEM_BYTES >> 10}k")
    at.mkdir()
    with uninterrupted():
        run("mount", device, str(at))
        stack.callback(unmount, at)
    return device


def unmount(at: Path) -> None:
    """Unmount the file system, if it is mounted. Raises Fault."""
    if swapdev.is_mounted(at):
        run("umount", str(at))


def _detach(device: str) -> None:
    # it is detached already after a run that passed
    with suppress(Refused):
        swapdev.detach(device)


def run(*command: str) -> None:
    """Run a command of the system. Raises Fault."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=HANG_S, check=False)
    if done.returncode:
        raise Fault(f"{' '.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr).strip()}")
