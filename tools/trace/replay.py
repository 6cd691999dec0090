"""Replay: simulate the pool's choice of victims over a trace. Pure: no store, no tier, no clock, sizes only.

Records are appended to the open segment of their lane, packed or raw, as the store does. `limit` segments fit in RAM, open ones
included. When one more has to be opened, a choice function names the sealed segment that is written to disk, raw ones first. A load
from RAM marks its segment as loaded from; segments that a choice passes over lose the mark. Overwrites and discards make records
dead, and a sealed segment without live records is freed.

Left out are watermarks, merges of sparse segments, cleaning and recompression. So the figures compare one choice of victims with
another. They do not predict what the store itself would read and write.

Source: Appender.append (tmemfs/store/append.py), Tmem._victim and drop (tmemfs/store/tmem.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tmemfs.store.record import RECORD_HEADER_BYTES, record_bytes, start_of
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES
from tools.trace.format import DISCARD, STORE, Request

#: Takes sealed segments, oldest first, with whether each was loaded from; returns the victim and those that were passed over.
Choice = Callable[[Iterable[tuple[int, bool]]], tuple[int | None, list[int]]]


def oldest_first(segments: Iterable[tuple[int, bool]]) -> tuple[int | None, list[int]]:
    """The baseline for `next_victim`: the oldest segment, no matter what was loaded from it."""
    return next((segment for segment, _ in segments), None), []


@dataclass(slots=True)
class Outcome:
    """Pages loaded from RAM and from disk, segments written to disk. Zero pages and empty slots are neither."""

    loads_ram: int = 0
    loads_disk: int = 0
    written: int = 0


@dataclass(slots=True)
class Lane:
    """`opened` is the open segment, filled up to `fill`; `sealed` are those in RAM, oldest first."""

    opened: int | None = None
    fill: int = SEGMENT_BYTES
    sealed: dict[int, None] = field(default_factory=dict)


class Pool:
    """At most `limit` segments in RAM, whose victims `choose` names. The minimum is two: one open in each lane."""

    def __init__(self, limit: int, choose: Choice) -> None:
        self.outcome = Outcome()
        self._limit = max(limit, 2)
        self._choose = choose
        self._packed, self._raw = Lane(), Lane()
        self._places: dict[int, tuple[int, int]] = {}
        self.live: dict[int, int] = {}
        self._on_disk: set[int] = set()
        self._loaded: set[int] = set()
        self._next = 0

    @property
    def lanes(self) -> tuple[Lane, Lane]:
        """The raw lane and the packed one: in this order their segments leave RAM."""
        return self._raw, self._packed

    def opened(self, segment: int) -> None:
        """For those who want to know: `segment` takes records from now on."""

    def vanished(self, segment: int) -> None:
        """Nothing of `segment` is live any more."""

    def evict_free(self) -> bool:
        """Have a segment leave RAM without a write; whether there was one."""
        return False

    def leave(self, segment: int) -> None:
        """`segment`, which is sealed, lies on disk alone."""
        for lane in self.lanes:
            lane.sealed.pop(segment, None)
        self._on_disk.add(segment)

    @property
    def in_ram(self) -> int:
        """Segments in RAM."""
        return sum(len(lane.sealed) + (lane.opened is not None) for lane in (self._packed, self._raw))

    def is_on_disk(self, slot: int) -> bool:
        """Whether the page of `slot` lies on disk."""
        return slot in self._places and self._places[slot][0] in self._on_disk

    def play(self, request: Request) -> None:
        """Perform one request."""
        slots = range(request.first, request.first + request.count)
        if request.operation == STORE:
            for slot, payload in zip(slots, request.payloads, strict=True):
                self.store(slot, payload)
        else:
            act = self.discard if request.operation == DISCARD else self.load
            for slot in slots:
                act(slot)

    def store(self, slot: int, payload: int) -> None:
        """Store a page with a payload of that many bytes; 0 is a zero page, which has no record."""
        # the new record before the old one is dead, as in the store: the old one may be in the segment that is evicted
        place = self._append(payload) if payload else None
        old = self._places.pop(slot, None)
        if place:
            self._places[slot] = place
        if old:
            self._kill(*old)

    def load(self, slot: int) -> None:
        """Load a page from RAM or disk."""
        segment, _ = self._places.get(slot, (None, 0))
        if segment is None:
            return
        if segment in self._on_disk:
            self.outcome.loads_disk += 1
        else:
            self.outcome.loads_ram += 1
            self._loaded.add(segment)

    def discard(self, slot: int) -> None:
        """Discard a page."""
        if place := self._places.pop(slot, None):
            self._kill(*place)

    def _append(self, payload: int) -> tuple[int, int]:
        """Append a record to its lane; returns its segment and its size."""
        lane = self._raw if payload == PAGE_BYTES else self._packed
        if start_of(lane.fill, payload) + RECORD_HEADER_BYTES + payload > SEGMENT_BYTES:
            self._open_next(lane)
        assert lane.opened is not None
        size = record_bytes(payload)
        lane.fill = start_of(lane.fill, payload) + size
        self.live[lane.opened] += size
        return lane.opened, size

    def _kill(self, segment: int, size: int) -> None:
        self.live[segment] -= size
        if not self.live[segment] and segment not in (self._packed.opened, self._raw.opened):
            self._vanish(segment)

    def _vanish(self, segment: int) -> None:
        del self.live[segment]
        self.vanished(segment)
        self._on_disk.discard(segment)
        self._loaded.discard(segment)
        for lane in (self._packed, self._raw):
            lane.sealed.pop(segment, None)

    def _open_next(self, lane: Lane) -> None:
        while self.in_ram >= self._limit:
            self._evict()
        self._seal(lane)
        lane.opened, lane.fill = self._next, 0
        self.live[self._next] = 0
        self.opened(self._next)
        self._next += 1

    def _evict(self) -> None:
        """Write one segment to disk; if none is sealed, seal the open ones, as the shrinker does."""
        if self.evict_free():
            return
        lane = self._raw if self._raw.sealed else self._packed
        if not lane.sealed:
            self._seal(self._packed)
            self._seal(self._raw)
            return
        victim, passed = self._choose((segment, segment in self._loaded) for segment in lane.sealed)
        assert victim is not None
        self._loaded.difference_update(passed)
        self.leave(victim)
        self.outcome.written += 1

    def _seal(self, lane: Lane) -> None:
        if lane.opened is not None:
            segment, lane.opened, lane.fill = lane.opened, None, SEGMENT_BYTES
            lane.sealed[segment] = None
            if not self.live[segment]:
                self._vanish(segment)


def replay(requests: Iterable[Request], limit: int, choose: Choice) -> Outcome:
    """What a pool of `limit` segments loads and writes for `requests`."""
    pool = Pool(limit, choose)
    for request in requests:
        pool.play(request)
    return pool.outcome


def footprint(requests: Iterable[Request]) -> int:
    """The most segments that a pool without a limit has in RAM during `requests`."""
    pool, most = Pool(sys.maxsize, oldest_first), 0
    for request in requests:
        pool.play(request)
        most = max(most, pool.in_ram)
    return most
