"""The page path without a mount: a store next to bare compression of the same pages, a load next to bare decompression.

Each round measures both over the same pages, one after the other. The figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Final

import lz4.block

from tmemfs.cli.real_pages import RealPages
from tmemfs.engine import Engine
from tmemfs.store.codec import parse_codec
from tmemfs.store.extents import Extents
from tmemfs.store.frames import Arena
from tmemfs.store.segments import SegmentTable
from tmemfs.store.slots import SlotTable
from tmemfs.store.tmem import Tmem
from tmemfs.system.memory import heap_settings
from tmemfs.tiers.in_memory import MemoryTier
from tmemfs.units import PAGE_BYTES

PAGES: Final = 4096
BATCH: Final = 32


@dataclass(frozen=True, slots=True)
class Paired:
    """Medians over rounds: microseconds of CPU per page, and the ratios."""

    ours_us: float
    bare_us: float
    ratio: float


def measure(rounds: int) -> dict[str, Paired]:
    """'store' and 'load', with the daemon's heap settings."""
    heap_settings()
    frames = PAGES * PAGE_BYTES * 2 >> 20
    make_tmem = partial(Tmem, SlotTable(PAGES), SegmentTable(4 * frames), Arena(2 * frames, 2 * frames), Extents(frames))
    engine = Engine.over(make_tmem, MemoryTier(0), parse_codec("lz4"))
    supply = RealPages()
    pages = [supply.page(number) for number in range(PAGES)]
    batches = [memoryview(b"".join(pages[at : at + BATCH])) for at in range(0, PAGES, BATCH)]
    payloads = [lz4.block.compress(page, "default", False) for page in pages]

    def store() -> None:
        for number, batch in enumerate(batches):
            engine.pager.write(number * BATCH * PAGE_BYTES, batch)

    def compress() -> None:
        for page in pages:
            lz4.block.compress(page, "default", False)

    def load() -> None:
        for slot in range(PAGES):
            engine.tmem.load(slot)

    def decompress() -> None:
        for payload in payloads:
            lz4.block.decompress(payload, PAGE_BYTES)

    for _ in range(3):
        store()  # fault the frames in
    return {"store": _paired(store, compress, rounds), "load": _paired(load, decompress, rounds)}


def _paired(ours: Callable[[], None], bare: Callable[[], None], rounds: int) -> Paired:
    pairs = [(_cpu_us(ours), _cpu_us(bare)) for _ in range(rounds)]
    return Paired(median(a for a, _ in pairs), median(b for _, b in pairs), median(a / b for a, b in pairs))


def _cpu_us(run: Callable[[], None]) -> float:
    began = time.thread_time()
    run()
    return (time.thread_time() - began) / PAGES * 1e6
