"""`python -m tools.bench.full [--limit SIZE] [--only NAME] [--output DIR]`: how long a process lives that needs more than fits.

A process in a memory cgroup needs eight times its limit, as pages of noise. The swap takes less than two times the limit. What is
measured is from the first page that the swap refuses until the OOM killer kills the process: seconds, how often each page of the
cgroup is written again, refused requests, and the daemon's CPU per request.

    tmemfs           with a limit on the backing
    tmemfs-disk      with a backing on a file system that is full
    zram-lz4         with mem_limit
    swappiness       tmemfs, with memory.swappiness of the cgroup (v1) or vm.swappiness (v2) set to 0 at the first refusal
    swap-limit       tmemfs, with the cgroup's swap limited to what tmemfs takes (memory.swap.max, or memory.memsw in v1)
    fits             tmemfs with a swap no larger than what the store can take

Needs root, FUSE, zram and gcc. One run each. Other programs on the machine affect the seconds, not the counts. Prints Markdown,
writes full.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tmemfs.errors import TmemfsError
from tmemfs.system.capabilities import require_root
from tmemfs.system.swapdev import SYS_BLOCK
from tmemfs.units import GIB, MIB, PAGE_BYTES, parse_size
from tools.bench.accounts import cpu_s, parse_flat
from tools.bench.contenders import Limits, Swap, Tmemfs, Zram, turned_on
from tools.bench.growth import Row, table
from tools.bench.limited import limited, oom_kills
from tools.bench.native import TOUCHER, compiled
from tools.cgroup import MemoryCgroup
from tools.interrupts import interruptible

OVERFILL: Final = TOUCHER.with_name("overfill.c")
#: How the process touches its pages.
ORDERS: Final = ("in-order", "at-random")
NAMES: Final = ("tmemfs", "tmemfs-disk", "zram-lz4", "swappiness", "swap-limit", "fits")
_WANTS: Final = 8
_SWAP_BYTES: Final = 4 * GIB
_PATIENCE_S: Final = 280.0
_POLL_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class Store:
    """A swap that can be full, and how many of its requests (zram: pages) it has refused so far."""

    swap: Swap
    refused: Callable[[], int]


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", default="64M", help="limit of the cgroup; pool and backing have the same")
    parser.add_argument("--only", choices=NAMES, help="one of them")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="where backing files go")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="where full.json goes")
    arguments = parser.parse_args()
    require_root()
    limit_bytes = parse_size(arguments.limit)
    names = (arguments.only,) if arguments.only else NAMES
    rows = []
    try:
        with interruptible("turning everything off"), tempfile.TemporaryDirectory(dir=arguments.directory) as place:
            for order in ORDERS:
                rows += [measure(name, order, limit_bytes, Path(place)) for name in names]
    except TmemfsError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "full.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))
    return 0


def measure(name: str, order: str, limit_bytes: int, place: Path) -> Row:
    """One process, from its start to its end."""
    with ExitStack() as undo:
        store = undo.enter_context(_store(name, limit_bytes, place))
        cgroup = undo.enter_context(limited(limit_bytes, may_kill=True))
        if name == "swappiness":
            store = replace(store, refused=_gives_up(store.refused, cgroup, undo))
        if name == "swap-limit":
            _limit_swap(cgroup, limit_bytes, _fitting(limit_bytes))
        return {"swap": name, "pages": order, **_overfill(store, order, limit_bytes, cgroup)}


def _fitting(limit_bytes: int) -> int:
    """Bytes of noise that fit into a pool and a backing of `limit_bytes` each."""
    return 2 * limit_bytes * 3 // 4


def _limit_swap(cgroup: MemoryCgroup, limit_bytes: int, swap_bytes: int) -> None:
    both = cgroup.path / "memory.memsw.limit_in_bytes"
    if both.exists():
        both.write_text(str(limit_bytes + swap_bytes))
    else:
        (cgroup.path / "memory.swap.max").write_text(str(swap_bytes))


@contextmanager
def _store(name: str, limit_bytes: int, place: Path) -> Iterator[Store]:
    limits = Limits(_fitting(limit_bytes) if name == "fits" else _SWAP_BYTES)
    with ExitStack() as undo:
        if name == "zram-lz4":
            swap = undo.enter_context(turned_on(Zram("lz4"), place, limits))
            block = SYS_BLOCK / Path(swap.device).name
            (block / "mem_limit").write_text(str(2 * limit_bytes))
            yield Store(swap, lambda: int((block / "io_stat").read_text().split()[1]))
            return
        if name == "tmemfs-disk":
            place = undo.enter_context(_file_system(place, limit_bytes))
        swap = undo.enter_context(turned_on(Tmemfs(), place, limits))
        control = place / "tmemfs" / "mnt" / "control"
        (control / "pool.max").write_text(str(limit_bytes))
        if name == "tmemfs-disk":
            _fill(place / "other")
        else:
            (control / "backing.max").write_text(str(limit_bytes))
        yield Store(swap, lambda: parse_flat((control / "events").read_text())["stores_refused"])


@contextmanager
def _file_system(place: Path, size_bytes: int) -> Iterator[Path]:
    """A new ext4 below `place`."""
    image, root = place / "image", place / "root"
    with image.open("wb") as file:
        file.truncate(size_bytes)
    root.mkdir()
    with ExitStack() as undo:
        undo.callback(root.rmdir)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        undo.callback(lambda: subprocess.run(["umount", root], check=True))
        subprocess.run(["mount", "-o", "loop", image, root], check=True)
        yield root


def _fill(file: Path) -> None:
    """Fill the file system."""
    with file.open("wb", buffering=0) as out, suppress(OSError):
        while out.write(bytes(MIB // 16)):
            pass
        # a short write was the last one


def _gives_up(refused: Callable[[], int], cgroup: MemoryCgroup, undo: ExitStack) -> Callable[[], int]:
    """`refused`, which stops the kernel from swapping out of `cgroup` once it is above 0."""
    knob = cgroup.path / "memory.swappiness"
    if not knob.exists():
        knob = Path("/proc/sys/vm/swappiness")
        undo.callback(knob.write_text, knob.read_text())

    def count() -> int:
        if count := refused():
            knob.write_text("0")
        return count

    return count


def _overfill(store: Store, order: str, limit_bytes: int, cgroup: MemoryCgroup) -> Row:
    pages = limit_bytes // PAGE_BYTES
    command = [str(compiled(OVERFILL)), str(_WANTS * pages), str(cgroup.tasks), order]
    process = subprocess.Popen(command)
    began = full_at = time.monotonic()
    written, cpu, refused = _swapped_out(), _cpu_s(store), 0
    try:
        while process.poll() is None and time.monotonic() - began < _PATIENCE_S:
            if not refused:
                full_at, written, cpu, refused = time.monotonic(), _swapped_out(), _cpu_s(store), store.refused()
            time.sleep(_POLL_S)
        ended_s = time.monotonic() - full_at
        refusals = store.refused()
        return {
            "OOM-killed": "yes" if oom_kills(cgroup) else "no",
            "seconds from the first refusal": ended_s if refused else 0.0,
            "pages written again": (_swapped_out() - written) if refused else 0.0,
            "per page of the cgroup": (_swapped_out() - written) / pages if refused else 0.0,
            "refused": refusals,
            "daemon CPU each, us": (_cpu_s(store) - cpu) / max(refusals - refused, 1) * 1e6 if store.swap.daemons else 0.0,
        }
    finally:
        process.kill()
        process.wait()


def _swapped_out() -> int:
    return parse_flat(Path("/proc/vmstat").read_text())["pswpout"]


def _cpu_s(store: Store) -> float:
    return sum(map(cpu_s, store.swap.daemons))


if __name__ == "__main__":
    sys.exit(main())
