"""A daemon whose workers have faults: `python -m tests.faulty_worker DIRECTORY FAULT...`; it says 'ready' once its mount answers.

Mounts at DIRECTORY/mnt with DIRECTORY/backing and logs to DIRECTORY/log. A fault is NAME or NAME=VALUE:

    old-kernel        the kernel hands no request out again
    watchdog=S        seconds
    crash-write=SLOT  a write to the slot ends the worker
    crash-load=SLOT   a load of the slot from the tier ends the worker, in a follower's hands
    loop-write=SLOT   a write to the slot never ends
    crash-again       each worker but the first crashes before it serves
    tier=FILE         while FILE exists, reads of the tier do not return
    slow-tier=S       a write of the tier takes this long
    event-loop=FILE   once FILE exists, the event loop does nothing else any more
    lines             each second worker is killed before the N-th line of the page path, N the half of its number
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

from tmemfs import supervisor, worker
from tmemfs.fuse import kept_requests, mount, page_path, replies, wire
from tmemfs.holdings import Holdings
from tmemfs.jobs.pulse import Pulse
from tmemfs.options import Options
from tmemfs.pages.pager import Deferred, Pager
from tmemfs.system.memory_safety import MemorySafety
from tmemfs.system.status_region import Word
from tmemfs.tiers.tier import Extent, Tier
from tmemfs.units import MIB, PAGE_BYTES
from tmemfs.worker import Birth

SWAP_BYTES: Final = 64 * MIB
POOL_MAX: Final = "10M"
_LOOK_S: Final = 0.01
_FILES: Final = frozenset(module.__file__ for module in (kept_requests, page_path, replies, wire))

Faults = dict[str, str]


class FaultyPager(Pager):
    """A pager that does not survive some pages."""

    def __init__(self, faults: Faults, *parts: Any) -> None:
        super().__init__(*parts)
        self._faults = faults
        self._read_really = self.read_page
        self.read_page = self._read_page

    def _read_page(self, slot: int) -> bytes:
        if str(slot) == self._faults.get("crash-load"):
            os.abort()
        return self._read_really(slot)

    def write(self, offset: int, data: memoryview) -> Deferred | None:
        """As Pager, or not."""
        slot = str(offset // PAGE_BYTES)
        if slot == self._faults.get("crash-write"):
            os.abort()
        while slot == self._faults.get("loop-write"):
            pass
        return super().write(offset, data)


class HangingTier:
    """`tier`, whose reads do not return while `file` exists, and whose writes take `write_s`."""

    def __init__(self, tier: Tier, file: str, write_s: float) -> None:
        self._tier = tier
        self._file = file
        self._write_s = write_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tier, name)

    def read(self, extent: Extent, offset: int, into: memoryview, sequence: int) -> None:
        """See Tier."""
        _wait_while(self._file)
        self._tier.read(extent, offset, into, sequence)

    def write(self, extent: Extent, data: memoryview, sequence: int, for_cleaning: bool = False) -> None:
        """See Tier."""
        time.sleep(self._write_s)
        self._tier.write(extent, data, sequence, for_cleaning)


def _wait_while(file: str) -> None:
    while file and os.path.exists(file):
        time.sleep(_LOOK_S)


def hang_event_loop(file: str) -> None:
    """Have the pulse beat no more while `file` exists, and nothing else run."""
    really = Pulse.beat

    def beat(pulse: Pulse) -> None:
        really(pulse)
        _wait_while(file)

    setattr(Pulse, "beat", beat)  # noqa: B010


def die_before_line(number: int, holdings: Holdings) -> None:
    """Have this process killed before the `number`-th line of the page path that it runs once it serves."""
    left = [number]

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in _FILES:
            return None
        if event == "line" and holdings.status.words[Word.IS_SERVING]:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    threading.settrace(trace)


def run(
    faults: Faults, options: Options, holdings: Holdings, safety: MemorySafety, birth: Birth, announce: Callable[[], None]
) -> None:
    """Be a worker with `faults`."""
    if "crash-again" in faults and birth.generation > 1:
        os.abort()
    if "lines" in faults and not birth.generation % 2:
        die_before_line(birth.generation // 2 + int(faults["lines"] or 0), holdings)
    if "event-loop" in faults:
        hang_event_loop(faults["event-loop"])
    tier = HangingTier(holdings.tier, faults.get("tier", ""), float(faults.get("slow-tier", 0)))
    worker.run_worker(options, replace(holdings, tier=tier), safety, birth, announce, partial(FaultyPager, faults))


def main() -> None:
    """Serve."""
    directory, faults = Path(sys.argv[1]), {name: value for name, _, value in (fault.partition("=") for fault in sys.argv[2:])}
    logging.basicConfig(level=logging.INFO, filename=directory / "log")
    if "old-kernel" in faults:
        setattr(mount, "_resends", lambda fd: False)  # noqa: B010
    options = Options(
        directory / "mnt",
        SWAP_BYTES,
        POOL_MAX,
        directory / "backing",
        watchdog_s=float(faults.get("watchdog", 0)),
        encrypt=False,
    )
    supervisor.serve(options, lambda: print("ready", flush=True), partial(run, faults))


if __name__ == "__main__":
    main()
