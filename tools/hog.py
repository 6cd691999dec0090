"""A memory hog that verifies every byte: touches real pages in random order and compares a hash of each with what it wrote.

    python tools/hog.py --size 1G --rounds 2 [--tasks FILE] [--seed N]

Enters the cgroup whose tasks file is given before it allocates. Prints one JSON object; exit 1 if a page was wrong.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import sys
import time
from array import array
from pathlib import Path
from random import Random

import xxhash

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tmemfs.samples import RealPages
from tmemfs.units import PAGE_BYTES, parse_size


def main() -> int:
    """Fill, then verify as often as asked."""
    parser = argparse.ArgumentParser(description="Touch memory in random order and verify every byte.")
    parser.add_argument("--size", default="256M")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tasks", type=Path, help="tasks file of the cgroup to enter")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    supply = RealPages(arguments.seed)
    if arguments.tasks:
        arguments.tasks.write_text(str(os.getpid()))
    answer = hog(parse_size(arguments.size) // PAGE_BYTES, arguments.rounds, supply, Random(arguments.seed))
    print(json.dumps(answer))
    return 1 if answer["wrong"] else 0


def hog(count: int, rounds: int, supply: RealPages, random: Random) -> dict[str, float]:
    """Fill `count` pages in random order and verify them `rounds` times, each time in another order."""
    memory = mmap.mmap(-1, count * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    order = array("l", range(count))
    hashes = array("Q", bytes(8 * count))
    random.shuffle(order)
    began = time.monotonic()
    for number in order:
        page = supply.page(number)
        memory[number * PAGE_BYTES : (number + 1) * PAGE_BYTES] = page
        hashes[number] = xxhash.xxh3_64_intdigest(page)
    filled_s = time.monotonic() - began
    wrong, touches = 0, array("d")
    for _ in range(rounds):
        random.shuffle(order)
        wrong += _verify(memory, order, hashes, touches)
    slowest_first = sorted(touches, reverse=True)
    return {
        "pages": count,
        "wrong": wrong,
        "fill_mb_per_s": count * PAGE_BYTES / 1e6 / filled_s,
        "touch_p50_us": slowest_first[len(touches) // 2] * 1e6 if touches else 0.0,
        "touch_p99_us": slowest_first[len(touches) // 100] * 1e6 if touches else 0.0,
    }


def _verify(memory: mmap.mmap, order: array[int], hashes: array[int], touches: array[float]) -> int:
    wrong = 0
    for number in order:
        began = time.perf_counter()
        page = memory[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]
        touches.append(time.perf_counter() - began)
        wrong += xxhash.xxh3_64_intdigest(page) != hashes[number]
    return wrong


if __name__ == "__main__":
    sys.exit(main())
