"""The pool's size: the one owner of what the pool may hold. Everything that needs a limit or a watermark asks here.

The least of these limits applies:

    limit          set by              in force
    pool.max       the user            always
    approached     a lower pool.max    until it is reached or given up
    allowed        memory pressure     while memory is short: what is held, so that no frame is taken that the kernel would have
                                       to find memory for, and no less than PRESSURE_FLOOR_BYTES or the ceiling

It is the arena's limit, whatever order they change in. The background shrinks the pool to lower marks: pool.high and
pool.low, or the ceiling of the pressure controller where that is lower.

A text written to control/pool.max goes through Limits.set_pool_max (limits.py), which shrinks the pool to it and then calls
`set_max`.

The limit of the daemon's cgroup has no row of its own: it is part of the headroom that the ceiling is made of
(system/pressure_signals.py, docs/decisions/0017).

Called in trio's thread, except for what any thread may read: properties. Knows nothing of who shrinks the pool.

Invariants:
1. low <= high <= max, and a maximum that is shown is in force: a lower one is set only once it is reached.
2. `notice` is called after each change that may leave something to shrink.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from tmemfs.policy.watermarks import Watermarks, background_goal
from tmemfs.store.tmem import Tmem
from tmemfs.units import SEGMENT_BYTES

#: The limit under memory pressure is no less: buffers, reserve, and a few frames for what passes through it. (The least pool.max
#: that is accepted is SMALLEST_POOL_BYTES of limits.py.)
PRESSURE_FLOOR_BYTES: Final = 12 * SEGMENT_BYTES


class PoolSize:
    """What the pool of `tmem` may hold. The maximum begins as the arena's limit, the watermarks as its 90% and 80%."""

    def __init__(self, tmem: Tmem, notice: Callable[[], None]) -> None:
        self._tmem = tmem
        self._notice = notice
        self._max_bytes = tmem.arena.limit * SEGMENT_BYTES
        self._high: int | None = None
        self._low: int | None = None
        self._approached = math.inf
        self._ceiling = math.inf
        self._allowed = math.inf
        self._is_short = False

    @property
    def limit_bytes(self) -> int:
        """The limit in force."""
        return int(min(self._max_bytes, self._approached, self._allowed))

    @property
    def marks(self) -> Watermarks:
        """pool.max, pool.high and pool.low: what is in force without pressure."""
        # Made when asked for, so that there is nothing to keep in step with the three settings.
        return Watermarks.below(self._max_bytes, self._high, self._low)

    @property
    def ceiling(self) -> float:
        """What the pool may hold by the pressure controller; infinity: as much as there may be."""
        return self._ceiling

    @property
    def is_short(self) -> bool:
        """Whether memory is short, so that the pool takes no frame that the kernel would have to find memory for."""
        # Not by what is allowed: there may be no ceiling yet, as when the mode becomes auto while memory is short.
        return self._is_short

    @property
    def is_above_high(self) -> bool:
        """Whether the background is to shrink the pool."""
        return self._tmem.pool_bytes > self._marks_in_force.high

    def background_goal(self, is_shrinking: bool) -> int:
        """Bytes the background has to free now."""
        return background_goal(self._tmem.pool_bytes, self._marks_in_force, is_shrinking)

    def approach(self, limit_bytes: int) -> None:
        """Hold no more than `limit_bytes`, until `set_max` or `give_up`."""
        self._approached = limit_bytes
        self._apply()

    def give_up(self) -> None:
        """What was approached cannot be reached: the maximum stays what it was."""
        self._approached = math.inf
        self._apply()

    def set_max(self, max_bytes: int) -> None:
        """Let the maximum be `max_bytes` from now on. Watermarks that were not set follow it."""
        self._max_bytes = max_bytes
        self._approached = math.inf
        self._apply()  # before the notice: the shrinker goes by the new limit
        self._notice()

    def set_high(self, high_bytes: int | None) -> None:
        """Let shrinking start above `high_bytes`; None: above a share of the maximum."""
        self._high = high_bytes
        self._notice()

    def set_low(self, low_bytes: int | None) -> None:
        """Let shrinking stop at `low_bytes`; None: at a share of the maximum."""
        self._low = low_bytes
        self._notice()

    def press(self, ceiling: float, is_short: bool) -> None:
        """The pressure controller asks for no more than `ceiling` bytes; `is_short`: and that what is held does not grow."""
        was_short, self._is_short, self._ceiling = self._is_short, is_short, ceiling
        if is_short:
            # What is held may be above the ceiling. A limit below it would have stores wait until the shrinker has caught up.
            self._allowed = max(self._tmem.pool_bytes, PRESSURE_FLOOR_BYTES, ceiling)
            self._apply()
        elif was_short:
            self._allowed = math.inf
            self._apply()
        if ceiling < self._tmem.pool_bytes:  # also where it was above the ceiling before: the shrinker may rest by now
            self._notice()

    @property
    def _marks_in_force(self) -> Watermarks:
        return self.marks.under(self._ceiling)

    def _apply(self) -> None:
        self._tmem.limit_pool(self.limit_bytes)
