"""A workload to record: a database in memory, built, indexed, and then asked for rows of which a few are asked for often.

`python -m tools.trace.database [--rows 120000] [--queries 6000]`. Prints what it found, which is the same at every run.
"""

from __future__ import annotations

import argparse
import sqlite3
from collections.abc import Iterator
from itertools import accumulate
from random import Random
from typing import Final

ZIPF: Final = 0.99
_WORDS: Final = (
    "page", "slot", "record", "segment", "frame", "extent", "tier", "lane", "victim", "seal", "store", "load", "clean", "merge",
    "pin", "room", "plan", "commit", "budget",
)  # fmt: skip


def rows(count: int, random: Random) -> Iterator[tuple[int, int, str]]:
    """Rows of (key, owner, text), keys in random order."""
    for key in random.sample(range(count), count):
        yield key, random.randrange(count // 16), " ".join(random.choices(_WORDS, k=random.randrange(10, 150)))


def main() -> None:
    """Build, then query."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=120_000)
    parser.add_argument("--queries", type=int, default=6_000)
    a = parser.parse_args()
    random = Random(1)
    base = sqlite3.connect(":memory:")
    base.execute("create table entry (key integer primary key, owner integer, text text)")
    base.executemany("insert into entry values (?, ?, ?)", rows(a.rows, random))
    base.execute("create index by_owner on entry (owner)")
    owners = random.sample(range(a.rows // 16), a.rows // 16)
    weights = list(accumulate(1 / rank**ZIPF for rank in range(1, len(owners) + 1)))
    found = 0
    for owner in random.choices(owners, cum_weights=weights, k=a.queries):
        [(total,)] = base.execute("select sum(length(text)) from entry where owner = ?", (owner,))
        found += total or 0
    print(found)


if __name__ == "__main__":
    main()
