"""The engine: the parts that perform the store's plans on one tier, put together."""

from __future__ import annotations

from dataclasses import dataclass

from tmemfs.engine.pager import Pager
from tmemfs.engine.reader import Reader
from tmemfs.engine.room import Room
from tmemfs.engine.shrinker import Shrinker
from tmemfs.store.codec import Codec
from tmemfs.store.policy import Watermarks
from tmemfs.store.tmem import Tmem
from tmemfs.tiers.tier import Tier
from tmemfs.units import SEGMENT_BYTES


@dataclass(frozen=True, slots=True)
class Engine:
    """A store, its tier, and what works between the two. `shrinker.run` is the caller's to start."""

    tmem: Tmem
    tier: Tier
    room: Room
    reader: Reader
    pager: Pager
    shrinker: Shrinker

    @classmethod
    def over(cls, tmem: Tmem, tier: Tier, codec: Codec) -> Engine:
        """An engine with watermarks below the arena's limit."""
        room, reader = Room(), Reader(tmem, tier)
        marks = Watermarks.below(tmem.arena.limit * SEGMENT_BYTES)
        return cls(tmem, tier, room, reader, Pager(tmem, reader, room, codec), Shrinker(tmem, tier, room, marks))
