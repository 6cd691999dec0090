"""The demonstration: the store alone takes real memory pages, shrinks them to a file, and verifies them byte by byte.

It needs neither root nor FUSE nor a mount. It drives the same store, shrinker, reader and file tier as the daemon.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import trio

from tmemfs.cli.real_pages import RealPages
from tmemfs.engine import Engine
from tmemfs.errors import Corrupt, NoSpace, Refused
from tmemfs.jobs.shrink_request import ShrinkRequest
from tmemfs.pages.pager import Deferred
from tmemfs.store.codec import Codec
from tmemfs.store.consistency import check
from tmemfs.store.extents import Extents
from tmemfs.store.frames import RESERVE_FRAMES, Arena
from tmemfs.store.segments import SegmentTable
from tmemfs.store.slots import SlotTable
from tmemfs.store.tmem import Tmem
from tmemfs.store.transitions import Notice
from tmemfs.system.memory import available_ram_bytes
from tmemfs.tiers.file import FileTier
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES, format_size

#: Pages stored at once: the kernel's swap-out clusters them too.
_BATCH_PAGES: Final = 32


def run(size_bytes: int, codec: Codec, directory: Path) -> None:
    """Store `size_bytes` of pages, shrink them to a file in `directory`, load and verify all; prints the figures.

    Raises Refused if the directory cannot hold a backing, Corrupt if a byte is wrong.
    """
    _refuse_too_large(size_bytes, directory)
    pages = size_bytes // PAGE_BYTES
    supply = RealPages()
    with _backing(directory) as tier:
        engine = Engine.over(partial(_tmem_for, pages), tier, codec)
        print(f"{pages} real memory pages ({format_size(size_bytes)}), {codec.name}, backing in {directory}")
        _store(engine, pages, supply)
        _shrink(engine)
        _verify(engine, pages, supply)
        check(engine.tmem)


def _refuse_too_large(size_bytes: int, directory: Path) -> None:
    """Raise Refused unless RAM and disk hold the pages even if none can be compressed."""
    if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK):
        raise Refused(f"{directory} cannot be written to: give another --directory")
    # an eighth more for the headers of records and the ends of segments that no record fits in
    needed, space = size_bytes // 8 * 9, os.statvfs(directory)
    for free, where in ((available_ram_bytes(), "RAM"), (space.f_bavail * space.f_frsize, f"disk at {directory}")):
        if needed > free:
            raise Refused(
                f"a demonstration of {format_size(size_bytes)} may need {format_size(needed)} of {where}, and "
                f"{format_size(free)} are free: give a smaller --size"
            )


def _tmem_for(pages: int, notice: Notice) -> Tmem:
    """A store that holds `pages` in RAM even if none can be compressed."""
    frames = pages * PAGE_BYTES // SEGMENT_BYTES * 9 // 8 + 2 * RESERVE_FRAMES
    return Tmem(SlotTable(pages), SegmentTable(2 * frames), Arena(frames, frames), Extents(frames), notice)


@contextmanager
def _backing(directory: Path) -> Iterator[FileTier]:
    with tempfile.TemporaryDirectory(prefix="tmemfs-demo-", dir=directory) as place:
        tier = FileTier(Path(place) / "backing")
        try:
            yield tier
        finally:
            tier.close()


def _store(engine: Engine, pages: int, supply: RealPages) -> None:
    spent_s = 0.0
    for first in range(0, pages, _BATCH_PAGES):
        data = b"".join(supply.page(number) for number in range(first, min(first + _BATCH_PAGES, pages)))
        # the pages are made before the clock starts
        began = time.perf_counter()
        refused = engine.pager.write(first * PAGE_BYTES, memoryview(data))
        spent_s += time.perf_counter() - began
        if refused:
            raise NoSpace("bug in tmemfs: the demonstration's pool is too small for its pages; please report it")
    compressed = engine.tmem.compressed_bytes
    ratio = pages * PAGE_BYTES / compressed
    print(f"  stored    {format_size(compressed)} compressed, ratio {ratio:.2f}, {spent_s / pages * 1e6:.1f} us per page")


def _shrink(engine: Engine) -> None:
    resident = engine.tmem.arena.region.resident_bytes
    before, compressed = resident(), engine.tmem.compressed_bytes
    answer = trio.run(engine.shrinker.shrink, ShrinkRequest.parse("all"))
    print(
        f"  shrunk    {format_size(before)} of RAM to {format_size(resident())} in {answer.seconds:.3f} s "
        f"({format_size(answer.freed / answer.seconds)}/s), "
        f"{format_size(answer.written)} written: {answer.written / compressed:.3f} x the compressed pages"
    )


def _verify(engine: Engine, pages: int, supply: RealPages) -> None:
    spent_s = 0.0
    for number in range(pages):
        began = time.perf_counter()
        page = engine.pager.read(number * PAGE_BYTES, PAGE_BYTES)
        # on disk, where a mount would have another thread load it
        if isinstance(page, Deferred):
            page = page.run() or b""
        spent_s += time.perf_counter() - began
        if page != supply.page(number):
            raise Corrupt(f"page {number} was loaded with wrong content: this is a bug in tmemfs, please report it")
    reads = engine.reader.counts
    each_bytes = reads.read_bytes / max(reads.records, 1)
    each_us = spent_s / pages * 1e6
    print(f"  verified  all {pages} pages, {reads.records} from disk, {each_bytes:.0f} bytes and {each_us:.1f} us per page")
