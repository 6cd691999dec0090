"""A program that locks memory, 2 MiB at a time, at a given rate or as fast as possible, and must not be killed because of a swap.

    python tools/grow.py --size 450M --rate 600M [--tasks FILE] [--hold S]

It enters the cgroup with the given tasks file before it locks anything. It prints the rate that it reached, in MB per second, and
keeps the memory for S seconds. Exit code 3 if the kernel refuses to lock more. The rate leaves out the time that it waited for a
processor: that was due to other programs, and the question is how long it waited for memory.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tmemfs.units import parse_size

STEP_BYTES = 2 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def grow(size: int, rate: float, hold_s: float) -> bool:
    """Lock `size` bytes at no more than `rate` bytes per second at any moment, print the rate reached, and hold them.

    Returns False if the kernel refused.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    next_at, began, waited = 0.0, time.monotonic(), _waited_s()
    for at in range(0, size, STEP_BYTES):
        while (now := time.monotonic()) < next_at:
            pass
        # counted from now, not from when it was due: a delay by another program must not be followed by a burst
        next_at = now + STEP_BYTES / rate
        if _libc.mlock(base + at, min(STEP_BYTES, size - at)):
            return False
    print(f"{size / (time.monotonic() - began - (_waited_s() - waited)) / 1e6:.0f}", flush=True)
    time.sleep(hold_s)
    return True


def _waited_s() -> float:
    """The total time that this process was ready to run and did not; 0 if the kernel does not count that."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def main() -> int:
    """Lock the memory that is asked for."""
    parser = argparse.ArgumentParser(description="Lock memory at a rate.")
    parser.add_argument("--size", required=True)
    parser.add_argument("--rate", default="1T")
    parser.add_argument("--tasks", type=Path, help="tasks file of the cgroup to enter")
    parser.add_argument("--hold", type=float, default=0, metavar="S", help="seconds to keep it (0)")
    arguments = parser.parse_args()
    if arguments.tasks:
        arguments.tasks.write_text(str(os.getpid()))
    return 0 if grow(parse_size(arguments.size), parse_size(arguments.rate), arguments.hold) else 3


if __name__ == "__main__":
    sys.exit(main())
