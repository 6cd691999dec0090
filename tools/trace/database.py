"""A workload to record: build a database in memory, index it, and query its rows, a few of them often.

`python -m tools.trace.database` prints what it found, which is the same at every run.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from itertools import accumulate
from random import Random
from typing import Final

ZIPF: Final = 0.99
_ROWS: Final = 120_000
_QUERIES: Final = 6_000
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
    random = Random(1)
    base = sqlite3.connect(":memory:")
    base.execute("create table entry (key integer primary key, owner integer, text text)")
    base.executemany("insert into entry values (?, ?, ?)", rows(_ROWS, random))
    base.execute("create index by_owner on entry (owner)")
    owners = random.sample(range(_ROWS // 16), _ROWS // 16)
    weights = list(accumulate(1 / rank**ZIPF for rank in range(1, len(owners) + 1)))
    found = 0
    for owner in random.choices(owners, cum_weights=weights, k=_QUERIES):
        [(total,)] = base.execute("select sum(length(text)) from entry where owner = ?", (owner,))
        found += total or 0
    print(found)


if __name__ == "__main__":
    main()
