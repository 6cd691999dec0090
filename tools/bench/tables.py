"""Tables of a comparison beside those of goals.py: wear, resumed programs, OOM kills, and what the disk did. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from tools.bench.accounts import OWN_WEAR, WEAR
from tools.bench.disk_watch import Check
from tools.bench.goals import cell, markdown
from tools.bench.statistics import Sample, by_round, spread

#: Figure and heading, of resumed programs.
_RESUME: Final = (
    ("answer_s", "whole answer, s"), ("resident_s", "the same in RAM, s"), ("first_s", "first answer, s"),
    ("swapped_share", "swapped out"), ("hog_s", "hog, s"), ("pages_in", "pages in"), ("disk_read_bytes", "bytes read"),
    ("daemon_s", "daemon CPU, s"), ("process_s", "program CPU, s"), (OWN_WEAR, "bytes written per page out"),
)  # fmt: skip


def wear_table(samples: Sequence[Sample]) -> str:
    """Bytes written per page swapped out, by the swap's own count and by the disk's: a column per contender."""
    some = [one for one in samples if WEAR in one.figures]
    names = list(dict.fromkeys(one.contender for one in some))
    rows = []
    for work in dict.fromkeys(one.workload for one in some):
        for figure, counted in ((OWN_WEAR, "own count"), (WEAR, "the disk's")):
            cells = [cell(spread(by_round(some, (name, work, figure)).values())) for name in names]
            rows.append([f"{work}, {counted}", *cells])
    return markdown(["bytes written per page swapped out", *names], rows)


def kills_table(samples: Sequence[Sample]) -> str:
    """Processes that the OOM killer ended in all rounds: a row per program, a column per contender."""
    some = [one for one in samples if one.workload.startswith("kills-")]
    names = list(dict.fromkeys(one.contender for one in some))
    rows = []
    for work in dict.fromkeys(one.workload for one in some):
        counts = [[one.figures["oom_kills"] for one in some if (one.workload, one.contender) == (work, name)] for name in names]
        rows.append([work.removeprefix("kills-"), *(f"{sum(each):.0f} in {len(each)}" if each else "-" for each in counts)])
    return markdown(["killed, in rounds", *names], rows)


def resume_table(samples: Sequence[Sample]) -> str:
    """A row per program, source and contender."""
    pairs = dict.fromkeys((one.workload, one.contender) for one in samples if one.workload.startswith("resume-"))
    rows = []
    for work, name in sorted(pairs):
        cells = [cell(spread(by_round(samples, (name, work, figure)).values())) for figure, _ in _RESUME]
        rows.append([work.removeprefix("resume-"), name, *cells])
    return markdown(["resumed", "", *(heading for _, heading in _RESUME)], rows)


def disk_table(checks: Iterable[Check]) -> str:
    """What the disk did, a row per check."""
    head = ["disk", "", "round", "MB read", "at most MB/s", "requests/s", "MB written", "at most MB/s", "requests/s", "limits"]
    rows = [
        [one.part, one.contender, str(one.round), f"{one.read_bytes / 1e6:,.0f}", f"{one.read_bps / 1e6:.1f}",
         f"{one.read_iops:,.0f}", f"{one.written_bytes / 1e6:,.0f}", f"{one.write_bps / 1e6:.1f}", f"{one.write_iops:,.0f}",
         f"**{one.excess}**" if one.excess else "held"]
        for one in checks
    ]  # fmt: skip
    return markdown(head, rows)
