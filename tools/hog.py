"""A memory hog that verifies every byte: it touches real pages in random order and compares a hash of each with what it wrote.

    python tools/hog.py --size 1G --rounds 2 [--tasks FILE] [--seed N]
    python tools/hog.py --size 1G --churn 0.2 [--tasks FILE] [--seed N]

It enters the cgroup with the given tasks file before it allocates. It prints one JSON object; exit code 1 if a page was wrong.

With --churn it runs until its standard input ends. Each round verifies all pages, frees the given share of them in runs, verifies
that those are zero, and fills them with other pages. It prints one JSON object per round, and ends at the first wrong page.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import select
import sys
import time
from array import array
from pathlib import Path
from random import Random
from typing import Final

import xxhash

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tmemfs.cli.real_pages import RealPages
from tmemfs.units import PAGE_BYTES, parse_size

_ZERO_HASH: Final = xxhash.xxh3_64_intdigest(bytes(PAGE_BYTES))
#: Pages freed at once: single ones, and whole clusters of the kernel, which it discards.
_RUNS: Final = (1, 16, 512, 2048)


def main() -> int:
    """Fill, then verify as often as requested."""
    parser = argparse.ArgumentParser(description="Touch memory in random order and verify every byte.")
    parser.add_argument("--size", default="256M")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--churn", type=float, metavar="SHARE", help="free and fill this share of the pages per round, until the input ends"
    )
    parser.add_argument("--tasks", type=Path, help="tasks file of the cgroup to enter")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    # before it enters the cgroup: these pages are not part of the hog
    supply = RealPages(arguments.seed)
    if arguments.tasks:
        arguments.tasks.write_text(str(os.getpid()))
    if arguments.churn is not None:
        return churn(Churned(parse_size(arguments.size) // PAGE_BYTES, supply, Random(arguments.seed)), arguments.churn)
    answer = hog(parse_size(arguments.size) // PAGE_BYTES, arguments.rounds, supply, Random(arguments.seed))
    print(json.dumps(answer))
    return 1 if answer["wrong"] else 0


def hog(count: int, rounds: int, supply: RealPages, random: Random) -> dict[str, float]:
    """Fill `count` pages in random order and verify them `rounds` times, each time in another order."""
    memory = mmap.mmap(-1, count * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # huge pages are swapped out as a whole, or split first: that is not what is tested
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


class Churned:
    """Pages that are freed and filled again, with a hash of what each contains."""

    def __init__(self, count: int, supply: RealPages, random: Random) -> None:
        self._count = count
        self._supply = supply
        self._random = random
        self._written = 0
        self._memory = mmap.mmap(-1, count * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.hashes = array("Q", [_ZERO_HASH]) * count
        self._order = array("l", range(count))

    def fill(self) -> int:
        """Write new content to all free pages; returns how many."""
        self._random.shuffle(self._order)
        empty = [number for number in self._order if self.hashes[number] == _ZERO_HASH]
        for number in empty:
            page = self._supply.page(self._written)
            self._written += 1
            self._memory[number * PAGE_BYTES : (number + 1) * PAGE_BYTES] = page
            self.hashes[number] = xxhash.xxh3_64_intdigest(page)
        return len(empty)

    def free(self, share: float) -> int:
        """Free runs of pages until `share` of all is free; returns how many. A free page is zero."""
        freed = 0
        while freed < share * self._count:
            first = self._random.randrange(self._count)
            pages = min(self._random.choice(_RUNS), self._count - first)
            self._memory.madvise(mmap.MADV_DONTNEED, first * PAGE_BYTES, pages * PAGE_BYTES)
            for number in range(first, first + pages):
                freed += self.hashes[number] != _ZERO_HASH
                self.hashes[number] = _ZERO_HASH
        return freed

    def verify(self) -> int:
        """How many pages do not have the content that was written."""
        self._random.shuffle(self._order)
        return _verify(self._memory, self._order, self.hashes, array("d"))


def churn(pages: Churned, share: float) -> int:
    """Run rounds until the standard input ends; returns 1 if a page was wrong."""
    while True:
        filled, wrong = pages.fill(), pages.verify()
        is_last = bool(select.select([sys.stdin], [], [], 0)[0])
        freed = 0 if is_last or wrong else pages.free(share)
        wrong += pages.verify() if freed else 0
        verified = len(pages.hashes) * (2 if freed else 1)
        print(json.dumps({"verified": verified, "wrong": wrong, "filled": filled, "freed": freed}), flush=True)
        if wrong or is_last:
            return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
