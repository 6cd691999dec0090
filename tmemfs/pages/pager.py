"""The pager: reads, writes and discards of the swap image, at any offset and of any length, in terms of pages.

A request that needs RAM alone is done at once, in the caller's thread. What needs a tier or a free frame comes back as a
`Deferred`, to be run where blocking is allowed: "load" and "long" ones by any of several threads, "store" ones by one thread, in
order of arrival. So neither a slow disk nor a store that waits holds up a load from RAM for long.

While the pool is full and nothing can be written back, a store is refused in the caller's thread, before it is encoded: the kernel
writes each refused page tens of times until its OOM killer acts, so a refusal must be cheap.

A store that waits holds its pages encoded, and no request buffer. Part of a page is patched into what the page holds at that
moment. The page's version is compared when the patch is stored, and the patch is made again if the page changed meanwhile.

Invariants:
1. A request is answered with success only when all of it is stored.
2. If a whole page is refused or fails, its old content is forgotten (frontswap's contract: no stale page is ever loaded). If part
   of a page is refused, the page is as it was. A write past the end of the image changes nothing.
3. A damaged page fails the requests that begin with it, or need a part of it: a read that reaches it gives what is in front. It is
   whole again once all of it is written or discarded. A part is never written into it, since nobody knows the rest.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, NamedTuple, NoReturn

from tmemfs.errors import Corrupt, NoSpace
from tmemfs.pages.free_frames import FreeFrames
from tmemfs.pages.reader import Reader
from tmemfs.store.codec import Codec, Packed, decode, encode
from tmemfs.store.native import encode_pages
from tmemfs.store.plans import ReadPlan
from tmemfs.store.record import EMPTY
from tmemfs.store.tmem import Tmem
from tmemfs.units import PAGE_BYTES

#: Slots that a discard forgets at once on the page path. A longer discard is done in steps of this size, by a thread.
DISCARD_SLOTS: Final = 2048

#: More than the number of pages that are compressed at once (store/compiled.pyx).
_WARM_PAGES: Final = 16

DeferredKind = Literal["load", "long", "store"]


class Deferred(NamedTuple):
    """The rest of a request. `run` may block; it gives the bytes of a read. Raises TierError, Corrupt, NoSpace."""

    kind: DeferredKind
    run: Callable[[], bytes | None]


@dataclass(slots=True)
class _Run:
    """Whole encoded pages from slot `first` on, of which `stored` are stored."""

    first: int
    packed: list[Packed]
    stored: int = 0


@dataclass(frozen=True, slots=True)
class _Patch:
    """`data` at byte `at` of the page of `slot`."""

    slot: int
    at: int
    data: bytes


class Pager:
    """Pages of `tmem` by byte offset; `codec` encodes those to come."""

    def __init__(self, tmem: Tmem, reader: Reader, free_frames: FreeFrames, codec: Codec) -> None:
        self.swap_bytes: Final = tmem.slots.count * PAGE_BYTES
        # Two aliases, not methods: a method that calls them would cost each load a call.
        #: The page of a slot, if it is in RAM; else None.
        self.load_page = tmem.load
        #: The page of a slot, wherever it lies. May block.
        self.read_page = reader.load
        self.codec = codec
        self.refused = 0
        self._tmem = tmem
        self._reader = reader
        self._free_frames = free_frames
        #: Guards `refused` and `_waiting`, which the page path and the store thread change. The page path reads them without it:
        #: it alone adds to `_waiting`, so it never misses a store that waits.
        self._lock = threading.Lock()
        self._waiting = 0

    def set_codec(self, codec: Codec) -> None:
        """Encode pages to come with `codec`; a request under way may still use the codec before it."""
        self.codec = codec

    def warm(self, requests: int, pages: int) -> None:
        """Use the heap once as much as `requests` waiting stores of `pages` pages each do.

        So it need not grow when memory is short. What is freed stays in the heap (memory.heap_settings).
        """
        # Noise does not compress, so its payloads are the largest; the half-filled pages go through the compressor's success.
        noise = memoryview(os.urandom(PAGE_BYTES) * pages)
        half = memoryview((os.urandom(PAGE_BYTES // 2) + bytes(PAGE_BYTES // 2)) * pages)
        # All at once, as when they wait: one after another they would use the same memory.
        waiting = [encode_pages(noise, self.codec) for _ in range(requests)]
        waiting[-1] += encode_pages(half, self.codec)
        for packed in waiting:
            b"".join(decode(tag, payload) for tag, payload in packed)

    def warm_thread(self) -> None:
        """Have the calling thread do once what it will do: its stack and its buffer are faulted in before memory is short."""
        half = os.urandom(PAGE_BYTES // 2) + bytes(PAGE_BYTES // 2)
        encode_pages(memoryview(half * _WARM_PAGES + os.urandom(PAGE_BYTES)), self.codec)
        self._reader.warm()

    def read(self, offset: int, size: int) -> bytes | Deferred:
        """Bytes [offset, offset + size) of the image, fewer at its end and in front of a damaged page. Raises Corrupt."""
        size = max(min(size, self.swap_bytes - offset), 0)
        if not size:
            return b""
        first, skip = divmod(offset, PAGE_BYTES)
        return self._read(self._tmem.plan_read(first, -(-(offset + size) // PAGE_BYTES) - first), skip, size)

    def _read(self, plan: ReadPlan, skip: int, size: int) -> bytes | Deferred:
        if plan.records:
            return Deferred("load", lambda: _joined(self._reader.perform(plan), skip, size))
        return _joined([page for page in plan.pages if page is not None], skip, size)

    def write(self, offset: int, data: memoryview) -> Deferred | None:
        """Store `data` (not borrowed after the return) at `offset`. Raises NoSpace past the end of the image."""
        if offset + len(data) > self.swap_bytes:
            raise NoSpace(f"the swap image ends at {self.swap_bytes} bytes: mount it with a larger --size")
        stuck = self._free_frames.stuck
        # Not `stuck` alone, which the shrinker resets at its next attempt: refusals end with the first frame that becomes free.
        if stuck is not None and not self._tmem.arena.has_free_frame and not _is_zero(data):
            self._refuse(offset, len(data), stuck)
        # Whole pages are all that swap writes: they are encoded as one batch and stored under one lock.
        if not (offset | len(data)) % PAGE_BYTES:
            return self._store(offset // PAGE_BYTES, encode_pages(data, self.codec))
        steps = self._steps(offset, data)
        try:
            # While a store waits this one queues behind it: an older write to the same page must not win.
            while steps and not self._waiting and self._apply(steps[0]):
                del steps[0]
        except Exception:
            self._give_up(steps)  # invariant 2
            raise
        if not steps:
            return None
        return self._wait_with(steps)

    def _refuse(self, offset: int, size: int, reason: str) -> NoReturn:
        """Refuse a write, and forget the whole pages that it replaces (invariant 2). Raises NoSpace.

        It does not queue behind stores that wait. They are not answered yet, so this write is concurrent with them, and either
        order is right.
        """
        first, end = -(-offset // PAGE_BYTES), (offset + size) // PAGE_BYTES
        if first < end:
            self._tmem.invalidate(first, end - first)
        with self._lock:
            self.refused += 1
        raise NoSpace(reason)

    def _store(self, first: int, packed: list[Packed]) -> Deferred | None:
        """Store whole pages: what swap-out is."""
        # As in `write`: no store passes one that waits.
        stored = 0 if self._waiting else self._tmem.store(first, packed)
        return None if stored == len(packed) else self._wait_with([_Run(first, packed, stored)])

    def _wait_with(self, steps: list[_Run | _Patch]) -> Deferred:
        self._wait(1)  # here and not in the thread that runs it: the next write must know already
        return Deferred("store", partial(self._finish, steps))

    def _wait(self, more: int) -> None:
        """`more` stores wait than before; negative: fewer."""
        with self._lock:
            self._waiting += more

    def discard(self, offset: int, length: int) -> Deferred | None:
        """Forget [offset, offset + length): it reads as zeros from now on."""
        end = min(offset + length, self.swap_bytes)
        first, last = -(-offset // PAGE_BYTES), end // PAGE_BYTES
        # An empty slot reads as zeros as it is; a patch would store a page of zeros there.
        edges = [edge for edge in self._edges(offset, end) if self._tmem.slots.handles[edge.slot] != EMPTY]
        # The leader does this, and holds the store's lock meanwhile: that is what DISCARD_SLOTS bounds.
        if first < last and last - first <= DISCARD_SLOTS:
            self._tmem.invalidate(first, last - first)
            last = first
        while edges and not self._waiting and self._apply(edges[0]):
            del edges[0]
        # Edges that wait are stores, and keep the order of stores. The thread for stores then forgets the whole pages as well.
        if edges:
            self._wait(1)
            return Deferred("store", partial(self._finish_discard, first, last, edges))
        return Deferred("long", partial(self._forget, first, last)) if first < last else None

    def _steps(self, offset: int, data: memoryview) -> list[_Run | _Patch]:
        """`data` cut into whole pages, encoded, and parts of pages, copied: nothing borrows the request buffer."""
        end = offset + len(data)
        steps: list[_Run | _Patch] = []
        at = offset
        while at < end:
            slot, within = divmod(at, PAGE_BYTES)
            whole = (end - at) // PAGE_BYTES * PAGE_BYTES if not within else 0
            size = whole or min(PAGE_BYTES - within, end - at)
            piece = data[at - offset : at - offset + size]
            steps.append(_Run(slot, encode_pages(piece, self.codec)) if whole else _Patch(slot, within, bytes(piece)))
            at += size
        return steps

    def _edges(self, offset: int, end: int) -> list[_Patch]:
        """Zeros for the parts of pages at both ends of [offset, end)."""
        pieces: list[_Patch] = []
        while offset < end:
            slot, within = divmod(offset, PAGE_BYTES)
            stop = min((slot + 1) * PAGE_BYTES, end)
            if stop - offset < PAGE_BYTES:
                pieces.append(_Patch(slot, within, bytes(stop - offset)))
            offset = stop if stop - offset < PAGE_BYTES else end // PAGE_BYTES * PAGE_BYTES
        return pieces

    def _apply(self, step: _Run | _Patch, may_block: bool = False) -> bool:
        """Do `step` as far as is possible now; whether it is finished."""
        if isinstance(step, _Run):
            step.stored = self._tmem.store(step.first, step.packed, step.stored)
            return step.stored == len(step.packed)
        while True:
            # The version first: a store or discard after this line makes `store_if` refuse, so nothing is lost.
            version = self._tmem.version(step.slot)
            page = self._tmem.load(step.slot)
            if page is None:
                if not may_block:
                    return False
                page = self._reader.load(step.slot)
            # Patched and encoded without the store's lock, which loads from RAM need.
            patched = page[: step.at] + step.data + page[step.at + len(step.data) :]
            stored = self._tmem.store_if(step.slot, version, encode(patched, self.codec))
            if stored is not False:
                return bool(stored)  # None: there is no free frame

    def _finish(self, steps: list[_Run | _Patch]) -> None:
        """Do `steps`, waiting for the tier and for free frames as long as it takes."""
        try:
            for step in steps:
                self._free_frames.wait_until(partial(self._apply, step, may_block=True))
        except Exception as error:
            with self._lock:
                self.refused += isinstance(error, NoSpace)
            self._give_up(steps)
            raise
        finally:
            # Only now may later stores be done directly: these pages are stored, or forgotten.
            self._wait(-1)

    def _give_up(self, steps: list[_Run | _Patch]) -> None:
        """Forget the whole pages of `steps` that were not stored: what they replace is stale."""
        for step in steps:
            if isinstance(step, _Run):
                self._tmem.invalidate(step.first + step.stored, len(step.packed) - step.stored)

    def _finish_discard(self, first: int, last: int, edges: list[_Patch]) -> None:
        self._forget(first, last)
        self._finish(list(edges))

    def _forget(self, first: int, last: int) -> None:
        # In steps: others get the store's lock in between.
        for start in range(first, last, DISCARD_SLOTS):
            self._tmem.invalidate(start, min(DISCARD_SLOTS, last - start))


def _joined(pages: list[bytes], skip: int, size: int) -> bytes:
    """`size` bytes of `pages` from byte `skip` on; fewer if a page behind them is damaged. Raises Corrupt."""
    data = b"".join(pages)[skip : skip + size]
    # A loop device without direct I/O reads page by page, and on Linux 6.1 it takes a short read for success, and zeros for the
    # page. One that begins at an odd offset reads across two slots.
    if len(data) < size <= PAGE_BYTES:
        raise Corrupt("a part of the request is damaged: check the backing device, then restart what used the page")
    return data


def _is_zero(data: memoryview) -> bool:
    """Whether `data` is all zeros: such pages take no memory in the pool, so they are stored also when it is full."""
    # The cheapest test first: nearly all that is not zero is found by its first byte or its first page.
    return not data[0] and not bytes(data[:PAGE_BYTES]).strip(b"\0") and not bytes(data).strip(b"\0")
