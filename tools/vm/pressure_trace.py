"""`python -m tools.vm.pressure_trace FILE.samples`: the demand of a guest on its pool, independent of what the pool did about it.

It reads the samples of a scenario (watch.py). For each sample of the kernel it prints the seconds since the first one, the headroom
in KiB that there would be with an empty pool (as system/pressure_signals.py counts it), and the pages swapped out so far. Any
controller can be tried on that, as tests/unit/test_pressure_traces.py does.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path

from tools.vm.watch import Row


def demands(lines: Iterable[str]) -> Iterator[str]:
    """The lines of a trace."""
    rows: list[Row] = list(map(json.loads, lines))
    pools = [(row["at"], row["pool"]) for row in rows if "pool" in row]
    kernel = [row for row in rows if "pool" not in row]
    for row in kernel:
        swappable = min(row["Active(anon)"] + row["Inactive(anon)"], row["SwapFree"])
        headroom = row["MemAvailable"] + swappable / 2 + _nearest(pools, row["at"])
        yield f"{row['at'] - kernel[0]['at']:.2f} {headroom / 1024:.0f} {row['pswpout'] - kernel[0]['pswpout']:.0f}"


def _nearest(samples: list[tuple[float, float]], at: float) -> float:
    """The value of the sample nearest to `at`; samples are in order of time."""
    after = bisect_left(samples, (at,))
    return min(samples[max(after - 1, 0) : after + 1], key=lambda sample: abs(sample[0] - at))[1]


if __name__ == "__main__":
    with Path(sys.argv[1]).open() as file:
        print("\n".join(demands(file)))
