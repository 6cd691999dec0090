"""`python -m tools.bench [--quick] [--directory DIR] [--output DIR]`: measure, print the table, write core.json and core.png.

Needs root, FUSE and fio. The sides of each comparison are interleaved within one run; figures are medians. Leaves nothing behind.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median

from tmemfs.errors import TmemfsError
from tmemfs.system.capabilities import require_root
from tmemfs.units import MIB, format_size
from tools.bench import cleaning, core, page_path
from tools.interrupts import interruptible
from tools.warm import use_memory

POOL_BYTES = 512 * MIB


def main() -> int:
    """Measure everything once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller pool and fewer rounds")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="where backing files and fio's file go")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="where core.json and core.png go")
    arguments = parser.parse_args()
    try:
        require_root()
        with interruptible("taking everything down"):
            _measure(arguments)
    except TmemfsError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


def _measure(arguments: argparse.Namespace) -> None:
    rounds = 3 if arguments.quick else 7
    pool_bytes = POOL_BYTES // 4 if arguments.quick else POOL_BYTES
    with tempfile.TemporaryDirectory(prefix="tmemfs-bench-", dir=arguments.directory) as place:
        paths = page_path.measure(rounds * 3)
        use_memory(4 * pool_bytes)
        done, reads, footprint = core.shrinks(Path(place), pool_bytes, rounds)
        ways = core.datapaths(Path(place), rounds)
        busy = cleaning.measure(Path(place), pool_bytes // 2, rounds)
    results = {
        "machine": _machine(),
        "pool_bytes": pool_bytes,
        "page_path": {name: asdict(pair) for name, pair in paths.items()},
        "shrinks": [asdict(one) for one in done],
        "reads": asdict(reads),
        "footprint": asdict(footprint),
        "cleaning": asdict(busy),
        "datapaths": {name: asdict(way) for name, way in ways.items()},
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "core.json").write_text(json.dumps(results, indent=2) + "\n")
    print(_table(paths, done, reads, footprint, ways, busy, pool_bytes))
    _plot(arguments.output / "core.png", paths, done, ways)


def _machine() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {"kernel": platform.release(), "python": platform.python_version(), "cores": str(os.cpu_count()), "commit": commit}


def _table(
    paths: dict[str, page_path.Paired],
    done: list[core.Shrink],
    reads: core.Reads,
    footprint: core.Footprint,
    ways: dict[str, core.Datapath],
    busy: cleaning.Busy,
    pool_bytes: int,
) -> str:
    shares = sorted(one.share for one in done)
    written = max(one.written_ratio for one in done)
    rate, fio = (median(getattr(one, key) for one in done) / 1e6 for key in ("compressed_rate", "fio_rate"))
    original = median(one.original_rate for one in done) / 1e6
    rows = [
        ("store, beside bare lz4", "<= 1.6", f"{paths['store'].ratio:.2f}", _us(paths["store"])),
        ("load from RAM, beside bare lz4", "<= 1.5", f"{paths['load'].ratio:.2f}", _us(paths["load"])),
        ("disk bytes by compressed byte", "<= 1.05", f"{written:.3f}", f"the worst of {len(done)} shrinks"),
        (f"shrink all of {format_size(pool_bytes)}, beside fio", ">= 0.8", f"{median(shares):.2f}",
            f"{rate:.0f} MB/s compressed, {original:.0f} MB/s of pages; fio {fio:.0f} MB/s; {shares[0]:.2f} to {shares[-1]:.2f}"),
        ("blocks read by a single-page load", "< 1.5", f"{reads.blocks_mean:.2f}",
            f"p50 {reads.p50_us:.0f} us, p99 {reads.p99_us:.0f} us through the loop device"),
        ("resident beyond pool and tables", "< 40 MB", f"{footprint.beyond / 1e6:.1f} MB", "after the shrinks and reads"),
        ("read from RAM, p99, cleaner busy beside idle", "<= 1.5", f"{busy.ratio:.2f}",
            f"{busy.busy_p99_us:.0f} us and {busy.idle_p99_us:.0f} us; {busy.cleaned_bytes / 1e6:.0f} MB cleaned"),
        *((f"random read from RAM, {name}", "-", f"p50 {way.p50_us:.0f} us",
            f"p99 {way.p99_us:.0f} us, daemon CPU {way.cpu_us:.0f} us a request") for name, way in ways.items()),
    ]  # fmt: skip
    head = "| figure | goal | measured | more |\n|---|---|---|---|\n"
    return head + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _us(pair: page_path.Paired) -> str:
    return f"{pair.ours_us:.1f} us and {pair.bare_us:.1f} us of CPU a page"


def _plot(file: Path, paths: dict[str, page_path.Paired], done: list[core.Shrink], ways: dict[str, core.Datapath]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install '.[plot]'", file=sys.stderr)
        return
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    page, shrink, way = figure.subplots(1, 3)
    for at, pair in enumerate(paths.values()):
        page.bar([at - 0.2, at + 0.2], [pair.ours_us, pair.bare_us], 0.4, color=["tab:blue", "tab:gray"])
        page.text(at, max(pair.ours_us, pair.bare_us), f"{pair.ratio:.2f} x", ha="center", va="bottom")
    page.set(xticks=range(len(paths)), xticklabels=paths, ylabel="CPU, us a page", title="tmemfs (blue), bare lz4 (gray)")
    page.margins(y=0.15)
    for label, color, key in (("tmemfs", "tab:blue", "compressed_rate"), ("fio", "tab:gray", "fio_rate")):
        shrink.plot([getattr(one, key) / 1e6 for one in done], "o-", color=color, label=label)
    shrink.set(xlabel="round", ylabel="MB/s to disk", title="shrink all, and fio just before", ylim=0)
    shrink.legend()
    way.bar(list(ways), [one.cpu_us for one in ways.values()], color=["tab:blue", "tab:orange"])
    way.set(ylabel="daemon CPU, us", title="one 4 KiB read from RAM")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
