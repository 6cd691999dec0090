"""Reclaim: what frames and extents need beside pages going in and out: memory released, holes punched, the reserve filled.

Plans like those of the store: the caller performs one, then commits or aborts it. Takes the store's lock itself.

Invariant: 1. A frame whose memory is being released, and an extent whose hole is being punched, is used again only after the end of
that plan.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Final

from tmemfs.store.extents import Extents
from tmemfs.store.frames import Arena, Frame
from tmemfs.store.plans import Discard, Populate, Release
from tmemfs.store.transitions import Notice


class Reclaim:
    """Plans what is reclaimed of `arena` and `extents`, under `lock`. `notice` is told of frames (transitions.py)."""

    def __init__(self, lock: threading.Lock, arena: Arena, extents: Extents, notice: Notice) -> None:
        self._lock: Final = lock
        self._arena: Final = arena
        self._extents: Final = extents
        self._notice: Final = notice

    def adopt_resident(self, resident: Mapping[Frame, int]) -> None:
        """Count frames that hold no segment and have memory behind them, with its bytes: a process that was killed left them.

        To be called at a start, before anything is stored: the store itself cannot ask the kernel for them.
        """
        with self._lock:
            self._arena.adopt_resident(resident)
            if self._arena.has_releasing:
                self._notice(False)

    def plan_release(self, most: int = 16) -> Release | None:
        """Up to `most` frames whose memory can be released to the system."""
        with self._lock:
            # A few at a time: what is taken cannot be used again before it is released, and a store may need it.
            frames = self._arena.take_releasing(most)
        return Release(frames) if frames else None

    def commit_release(self, plan: Release) -> None:
        """The memory is released."""
        with self._lock:
            had_frame, wanted = self._arena.has_free_frame, self._arena.wants_populating
            self._arena.released(plan.frames)
            self._tell(had_frame, wanted)

    def abort_release(self, plan: Release) -> None:
        """The memory could not be released; it stays counted and is tried again."""
        with self._lock:
            # They stay held: the limit is on memory that is allocated, whatever it is used for.
            had_frame, wanted = self._arena.has_free_frame, self._arena.wants_populating
            self._arena.keep(plan.frames)
            self._tell(had_frame, wanted)

    def plan_discard(self, most: int = 64) -> Discard | None:
        """Up to `most` extents whose holes are to be punched."""
        with self._lock:
            extents = self._extents.take_retired(most)
        return Discard(extents) if extents else None

    def commit_discard(self, plan: Discard) -> None:
        """The holes are punched: the extents are free."""
        with self._lock:
            self._extents.discarded(plan.extents, ok=True)

    def abort_discard(self, plan: Discard) -> None:
        """The holes could not be punched; the extents are written again, and those that are not are tried again later."""
        with self._lock:
            self._extents.discarded(plan.extents, ok=False)

    def punch_again(self) -> None:
        """Holes that could not be punched are to be tried again."""
        with self._lock:
            self._extents.punch_again()

    def punch_none(self) -> None:
        """The tier cannot discard: extents are free as soon as they are empty."""
        with self._lock:
            self._extents.punch_none()

    def plan_populate(self) -> Populate | None:
        """A frame to fault in for the reserve, if that is short and the limit allows it."""
        with self._lock:
            return Populate(self._arena.take_cold()) if self._arena.wants_populating else None

    def commit_populate(self, plan: Populate, ok: bool = True) -> None:
        """The frame is faulted in; not `ok`: the kernel had no memory for it."""
        with self._lock:
            self._arena.populated(plan.frame, ok)

    def _tell(self, had_frame: bool, wanted: bool) -> None:
        """What is held came below the limit, perhaps: then stores that wait for a frame, or the reserve, can go on."""
        is_freed = self._arena.has_free_frame and not had_frame
        if is_freed or (self._arena.wants_populating and not wanted):
            self._notice(is_freed)
