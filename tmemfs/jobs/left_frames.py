"""Left frames: memory in the arena that an earlier worker left behind, and that no segment refers to.

A worker that is killed had frames in reserve, and others whose memory it was about to release. The segment table names neither, and
the store asks the kernel nothing. So this is asked once, when a store was made over regions, and the store told.
"""

from __future__ import annotations

import logging

from tmemfs.store.frames import Frame
from tmemfs.store.tmem import Tmem
from tmemfs.system.residency import resident_parts
from tmemfs.units import SEGMENT_BYTES

log = logging.getLogger(__name__)


def adopt_left_frames(tmem: Tmem) -> None:
    """Have `tmem`, which nobody uses yet, count the frames with memory behind them that hold no segment."""
    arena = tmem.arena
    try:
        found = resident_parts(arena.region.fd, arena.region.map, SEGMENT_BYTES, arena.known)
    except OSError as error:
        # Pages are served all the same: what is not counted is found when its frame is used and released.
        log.error("memory that the last worker left could not be found: %s", error)
        return
    tmem.reclaim.adopt_resident({Frame(frame): size_bytes for frame, size_bytes in found.items()})
