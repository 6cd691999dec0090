"""`python -m tools.trace`: record the requests of a command to a swap, summarize them, and replay them.

    record --output FILE [--limit 64M] [--size 1G] [--pool-max 64M] -- COMMAND ...     run COMMAND, in a memory cgroup (root)
    show FILE ...                                                                      counts, slots, duration, reuse
    replay FILE ... [--segments 4,8,16]                                                loads from disk, by policy and pool
    ahead FILE ... [--segments 8,16] [--share 25] [--rest 0,0.5]                       what is written ahead, and dies

Exit codes: 0 done; that of COMMAND if it failed; 2 refused; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tmemfs.errors import TmemfsError
from tmemfs.policy.victims import next_victim
from tmemfs.system.capabilities import require_root
from tmemfs.units import parse_size
from tools.trace.ahead import replay_ahead
from tools.trace.format import read
from tools.trace.replay import Choice, oldest_first, replay
from tools.trace.session import recorded_swap, run
from tools.trace.summary import summary

POLICIES: Final[dict[str, Choice]] = {"oldest first": oldest_first, "second chance": next_victim}


def table(files: list[Path], limits: list[int]) -> Iterator[str]:
    """Markdown, a line per trace, size and policy."""
    yield "| trace | segments | policy | loads from RAM | loads from disk | segments written |\n|---|---|---|---|---|---|"
    for file in files:
        requests = list(read(file))
        for limit in limits:
            for name, choose in POLICIES.items():
                done = replay(requests, limit, choose)
                yield f"| {file.stem} | {limit} | {name} | {done.loads_ram} | {done.loads_disk} | {done.written} |"


def ahead_table(files: list[Path], limits: list[int], share: float, rests_s: list[float]) -> Iterator[str]:
    """Markdown, a line per trace, size and rest: segments written without and with write-ahead, and what died."""
    yield "| trace | segments | rest, s | written without | written with | ahead, MB | died, MB |\n|---|---|---|---|---|---|---|"
    for file in files:
        requests = list(read(file))
        for limit in limits:
            without = replay(requests, limit, next_victim).written
            for rest_s in rests_s:
                done = replay_ahead(requests, limit, share, rest_s * 1e6)
                figures = f"{done.written} | {done.ahead_bytes / 1e6:.1f} | {done.died_bytes / 1e6:.1f}"
                yield f"| {file.stem} | {limit} | {rest_s:g} | {without} | {figures} |"


def record(a: argparse.Namespace) -> int:
    """Run a command on a swap that records; the command's exit code."""
    require_root()
    limit_bytes = parse_size(a.limit)
    with recorded_swap(a.output, a.size, a.pool_max):
        code = run(a.command, limit_bytes)
    print(summary(read(a.output)), f"file_bytes    {a.output.stat().st_size}", sep="\n")
    if code:
        print(f"trace: {a.command[0]} ended with {code}", file=sys.stderr)
    return code


def main() -> int:
    """Run the command that is asked for."""
    a = _parser().parse_args()
    try:
        if a.action == "record":
            return record(a)
        if a.action == "replay":
            for line in table(a.files, [int(size) for size in a.segments.split(",")]):
                print(line, flush=True)
        elif a.action == "ahead":
            rests = [float(rest) for rest in a.rest.split(",")]
            for line in ahead_table(a.files, [int(size) for size in a.segments.split(",")], a.share / 100, rests):
                print(line, flush=True)
        else:
            for file in a.files:
                print(file.name, summary(read(file)), sep="\n")
    except (TmemfsError, OSError) as error:
        print(f"trace: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.trace", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    recording = actions.add_parser("record")
    recording.add_argument("--output", type=Path, required=True)
    recording.add_argument("--limit", default="64M")
    recording.add_argument("--size", default="1G")
    recording.add_argument("--pool-max", default="64M")
    recording.add_argument("command", nargs="+")
    actions.add_parser("show").add_argument("files", type=Path, nargs="+")
    replaying = actions.add_parser("replay")
    replaying.add_argument("files", type=Path, nargs="+")
    replaying.add_argument("--segments", default="4,8,16")
    writing = actions.add_parser("ahead")
    writing.add_argument("files", type=Path, nargs="+")
    writing.add_argument("--segments", default="8,16,64")
    writing.add_argument("--share", type=float, default=25)
    writing.add_argument("--rest", default="0,0.5")
    return parser


if __name__ == "__main__":
    sys.exit(main())
