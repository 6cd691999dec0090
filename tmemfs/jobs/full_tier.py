"""What can be done when the tier has no extent for the next segment: free a frame in RAM instead, or an extent by cleaning.

This is done whatever the thresholds of the background say, because stores wait for it. Any thread.
"""

from __future__ import annotations

from tmemfs.jobs.merger import Merger
from tmemfs.jobs.throttle import Throttle
from tmemfs.units import BLOCK_BYTES


class FullTier:
    """Frees frames and extents by `merger`, which does not give way meanwhile (`throttle`)."""

    def __init__(self, merger: Merger, throttle: Throttle) -> None:
        self._merger = merger
        self._throttle = throttle

    def free_frame_or_extent(self) -> int | None:
        """How many frames the system gets back; None: nothing can be gained. Raises TierError.

        Merges in RAM come first: they cost no I/O, and a frame that they gain takes what could not be written. What goes on in the
        background already is waited for, and counts.
        """
        before = self._merger.merges_done
        with self._throttle.hurry():
            frames = self._merger.compact_until_gain()
            if frames is not None:
                return frames
            if self._merger.has_budget and self._merger.clean(BLOCK_BYTES):
                return 0
        # While this waited for a merge of the background, that one may have gained what was looked for.
        return 0 if self._merger.merges_done != before else None
