"""Reclaim: what frames and extents need besides pages going in and out: memory given back, holes punched, the reserve filled.

Plans like those of the store: whoever performs one commits or aborts it. Takes the store's lock itself.

Invariant: 1. A frame's memory is given back, and an extent whose hole is being punched used again, only after the end of that plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tmemfs.store.plans import Discard, Populate, Release

if TYPE_CHECKING:
    from tmemfs.store.tmem import Tmem


class Reclaim:
    """Plans the upkeep of `tmem`'s arena and extents."""

    def __init__(self, tmem: Tmem) -> None:
        self._tmem = tmem

    def plan_release(self, most: int = 16) -> Release | None:
        """Up to `most` frames whose memory can go back to the system."""
        with self._tmem.lock:
            frames = self._tmem.arena.take_releasing(most)
        return Release(frames) if frames else None

    def commit_release(self, plan: Release) -> None:
        """The memory has gone."""
        with self._tmem.lock:
            self._tmem.arena.released(plan.frames)

    def abort_release(self, plan: Release) -> None:
        """The memory could not be given back; it stays counted and is tried again."""
        with self._tmem.lock:
            self._tmem.arena.keep(plan.frames)

    def plan_discard(self, most: int = 64) -> Discard | None:
        """Up to `most` extents whose holes are to be punched."""
        with self._tmem.lock:
            extents = self._tmem.extents.take_retired(most)
        return Discard(extents) if extents else None

    def commit_discard(self, plan: Discard) -> None:
        """The holes are punched: the extents are free."""
        with self._tmem.lock:
            self._tmem.extents.discarded(plan.extents, ok=True)

    def abort_discard(self, plan: Discard) -> None:
        """The holes could not be punched; the extents are written again, and those that are not are tried again later."""
        with self._tmem.lock:
            self._tmem.extents.discarded(plan.extents, ok=False)

    def punch_again(self) -> None:
        """Holes that could not be punched are to be tried again."""
        with self._tmem.lock:
            self._tmem.extents.punch_again()

    def punch_none(self) -> None:
        """The tier cannot discard: extents are free as soon as they are empty."""
        with self._tmem.lock:
            self._tmem.extents.punch_none()

    def plan_populate(self) -> Populate | None:
        """A frame to fault in for the reserve, if that is short and the limit allows it."""
        with self._tmem.lock:
            return Populate(self._tmem.arena.take_cold()) if self._tmem.arena.wants_populating else None

    def commit_populate(self, plan: Populate, ok: bool = True) -> None:
        """The frame is faulted in; not `ok`: the kernel had no memory for it."""
        with self._tmem.lock:
            self._tmem.arena.populated(plan.frame, ok)
