"""`python -m tools.bench.anatomy [--rounds N] [--output DIR]`: where the CPU time of a swap-in from RAM and of a swap-out is spent.

A relay serves a socket pair instead of /dev/fuse. Another process feeds it with the kernel's requests, one at a time: reads of one
page, writes of 32. The cost of a step is the difference between two variants that differ in that step alone. Rounds are
interleaved, and figures are medians in microseconds of CPU per page of the serving thread. They do not include what the kernel does
beyond two system calls on a socket (FUSE, loop, wake-ups). Needs neither root nor FUSE.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

from tmemfs.cli.real_pages import RealPages
from tmemfs.engine import Engine
from tmemfs.fuse import wire
from tmemfs.fuse.mount import Device
from tmemfs.fuse.page_path import Inheritance
from tmemfs.fuse.relay import Relay
from tmemfs.pages.pager import Deferred, Pager
from tmemfs.store.codec import parse_codec
from tmemfs.store.extents import Extents
from tmemfs.store.frames import Arena
from tmemfs.store.segments import SegmentTable
from tmemfs.store.slots import SlotTable
from tmemfs.store.tmem import Tmem
from tmemfs.system.memory import heap_settings
from tmemfs.tiers.in_memory import MemoryTier
from tmemfs.units import PAGE_BYTES

INODE: Final = 2
PAGES: Final = 2048
BATCH: Final = 32
_REQUEST: Final = struct.Struct("<IIQQ16xQQI20x")  # header, fh, offset, size and the rest of READ and WRITE
_SOCKET_BYTES: Final = 1 << 20
#: The steps of both, for the picture.
_SHORT: Final = ("system calls", "Python", "record", "lz4")

Steps = dict[str, float]


class _End(BaseException):
    """The last request came."""


class _EndingPager(Pager):
    """The last request is a read behind the end of the image."""

    def read(self, offset: int, size: int) -> bytes | Deferred:
        """See Pager."""
        if offset >= self.swap_bytes:
            raise _End
        return super().read(offset, size)


def main() -> int:
    """Measure, print, write anatomy.json and anatomy.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="where anatomy.json and anatomy.png go")
    arguments = parser.parse_args()
    heap_settings()
    found = {"swap-in from RAM": swap_in(arguments.rounds), "swap-out": swap_out(arguments.rounds)}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "anatomy.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, steps in found.items():
        print(f"{name}: {sum(steps.values()):.1f} us of CPU a page")
        for step, us in steps.items():
            print(f"    {us:5.2f}  {step}")
    _plot(arguments.output / "anatomy.png", found)
    return 0


def swap_in(rounds: int) -> Steps:
    """Reads of one page each."""
    requests = [_request(wire.READ, slot * PAGE_BYTES, PAGE_BYTES) for slot in range(PAGES)]
    reply = bytes(wire.REPLY_BYTES + PAGE_BYTES)
    variants: dict[str, Callable[[], float]] = {
        "bare": lambda: _served(lambda end: _bare(end, reply), requests, 1),
        **{kind: lambda kind=kind: _served(_relay(_filled(kind)), requests, 1) for kind in ("zero", "raw", "lz4")},  # type: ignore[misc]
    }
    cost = _medians(variants, rounds)
    return {
        "two system calls, and the copies they make": cost["bare"],
        "Python: request in, lock, handle, reply out": cost["zero"] - cost["bare"],
        "finding and copying the record": cost["raw"] - cost["zero"],
        "lz4, beyond the copy it replaces": cost["lz4"] - cost["raw"],
    }


def swap_out(rounds: int) -> Steps:
    """Writes of BATCH pages each."""
    pages = RealPages()
    data = [b"".join(pages.page(first + at) for at in range(BATCH)) for first in range(0, PAGES, BATCH)]
    requests = [
        _request(wire.WRITE, number * BATCH * PAGE_BYTES, len(batch)) + batch for number, batch in enumerate(data)
    ]  # fmt: skip
    zeros = [request[: wire.IO_BYTES] + bytes(BATCH * PAGE_BYTES) for request in requests]
    reply = wire.written_reply(0, 0)
    variants: dict[str, Callable[[], float]] = {
        "bare": lambda: _served(lambda end: _bare(end, reply), requests, BATCH),
        "zero": lambda: _served(_relay(_empty("lz4")), zeros, BATCH),
        "raw": lambda: _served(_relay(_empty("none")), requests, BATCH),
        "lz4": lambda: _served(_relay(_empty("lz4")), requests, BATCH),
    }
    cost = _medians(variants, rounds)
    return {
        "two system calls, and the copies they make": cost["bare"],
        "Python: request in, lock, zero pages found, handles": cost["zero"] - cost["bare"],
        "record, checksum, copy into the segment": cost["raw"] - cost["zero"],
        "lz4, beyond the copying it saves": cost["lz4"] - cost["raw"],
    }


def _medians(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    seen: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            seen[name].append(run())
    return {name: median(costs) for name, costs in seen.items()}


def _request(opcode: int, offset: int, size: int) -> bytes:
    return _REQUEST.pack(wire.IO_BYTES, opcode, 1, INODE, 0, offset, size)


def _empty(codec: str) -> Engine:
    """An empty store whose frames are faulted in, like the reserve of a daemon."""
    frames = PAGES * PAGE_BYTES * 3 // 2 >> 20
    arena = Arena(frames, frames)
    arena.view[::PAGE_BYTES] = bytes(frames << 20)[::PAGE_BYTES]
    make_tmem = partial(Tmem, SlotTable(PAGES), SegmentTable(2 * frames), arena, Extents(frames))
    return Engine.over(make_tmem, MemoryTier(0), parse_codec(codec), _EndingPager)


def _filled(kind: str) -> Engine:
    """A store full of pages of one kind: 'zero', 'raw' (kept as they are) or 'lz4'."""
    engine, pages = _empty("none" if kind == "raw" else "lz4"), RealPages()
    for slot in range(PAGES):
        engine.pager.write(slot * PAGE_BYTES, memoryview(bytes(PAGE_BYTES) if kind == "zero" else pages.page(slot)))
    return engine


def _relay(engine: Engine) -> Callable[[int], None]:
    def serve(device: int) -> None:
        relay = Relay(Device(device, b"", resends=True), engine.pager, INODE, Inheritance.none(INODE))
        os.close(relay.namespace_fd)
        with suppress(_End):
            relay.pages.lead()
        relay.close()

    return serve


def _bare(device: int, reply: bytes) -> None:
    """Read and reply, and nothing else."""
    into = [bytearray(wire.IO_BYTES), bytearray(wire.REQUEST_BYTES)]
    os.readv(device, into)
    while wire.IO.unpack_from(into[0])[4] < PAGES * PAGE_BYTES:
        os.write(device, reply)
        os.readv(device, into)


def _served(serve: Callable[[int], None], requests: list[bytes], pages: int) -> float:
    """Microseconds of CPU per page that `serve` needs for `requests`, which another process sends one after the other."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
    child = os.fork()
    if not child:
        _ask(theirs, requests)
    theirs.close()
    spent: list[float] = []

    def run() -> None:
        began = time.thread_time()
        serve(ours.fileno())
        spent.append(time.thread_time() - began)

    thread = threading.Thread(target=run)
    thread.start()
    os.waitpid(child, 0)
    thread.join()
    ours.close()
    return spent[0] / (len(requests) * pages) * 1e6


def _ask(end: socket.socket, requests: list[bytes]) -> None:
    """In the child: send requests, and wait for each reply; never returns."""
    try:
        reply = bytearray(wire.REPLY_BYTES + PAGE_BYTES)
        for request in requests:
            end.sendall(request)
            end.recv_into(reply)
        end.sendall(_request(wire.READ, PAGES * PAGE_BYTES, PAGE_BYTES))
    finally:
        os._exit(0)


def _plot(file: Path, found: dict[str, Steps]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install '.[plot]'", file=sys.stderr)
        return
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    panel = figure.subplots()
    left = [0.0] * len(found)
    for number, short in enumerate(_SHORT):
        costs = [list(steps.values())[number] for steps in found.values()]
        bars = panel.barh(list(found), costs, left=left, color=f"C{number}", label=short)
        panel.bar_label(bars, [f"{us:.1f}" for us in costs], label_type="center", fontsize=8)
        left = [at + us for at, us in zip(left, costs, strict=True)]
    panel.set(xlabel="CPU of the daemon's thread, us per page")
    panel.legend(ncols=len(_SHORT), loc="upper center", bbox_to_anchor=(0.5, 1.25))
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
