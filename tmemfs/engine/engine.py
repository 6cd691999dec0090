"""The engine: the parts that perform the store's plans on one tier, put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from tmemfs.engine.cleaner import Cleaner
from tmemfs.engine.pager import Pager
from tmemfs.engine.reader import Reader
from tmemfs.engine.recompressor import Recompressor
from tmemfs.engine.room import Room
from tmemfs.engine.shrinker import Shrinker
from tmemfs.store.codec import Codec
from tmemfs.store.policy import Watermarks
from tmemfs.store.tmem import Tmem
from tmemfs.tiers.tier import Tier
from tmemfs.units import SEGMENT_BYTES

MakePager = Callable[[Tmem, Reader, Room, Codec], Pager]


@dataclass(frozen=True, slots=True)
class Engine:
    """A store, its tier, and what works between the two. `run` is the caller's to start."""

    tmem: Tmem
    tier: Tier
    room: Room
    reader: Reader
    pager: Pager
    cleaner: Cleaner
    shrinker: Shrinker
    recompressor: Recompressor

    @classmethod
    def over(cls, tmem: Tmem, tier: Tier, codec: Codec, make_pager: MakePager = Pager) -> Engine:
        """An engine with watermarks below the arena's limit. `make_pager` is for those who record what a pager is asked."""
        room, reader = Room(), Reader(tmem, tier)
        marks = Watermarks.below(tmem.arena.limit * SEGMENT_BYTES)
        pager, cleaner = make_pager(tmem, reader, room, codec), Cleaner(tmem, tier, reader)
        cleaner.refused = lambda: pager.refused
        shrinker = Shrinker(tmem, tier, room, cleaner, marks)
        return cls(tmem, tier, room, reader, pager, cleaner, shrinker, Recompressor(tmem))

    async def run(self) -> None:
        """What goes on in the background, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.cleaner.run)
            nursery.start_soon(self.shrinker.run)
            nursery.start_soon(self.recompressor.run)
