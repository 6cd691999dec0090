"""The control law of the pool under memory pressure. Pure: figures and the time are passed in, the ceiling of the pool comes out.

    room      memory that is still to be had without the pool: what is available, and half of what can still be swapped out, in the
              system or below the limit of the daemon's cgroup, whichever is less; and of that, what will be left in 30 ms if others
              go on taking as fast as they do (a reserve less at most)
    reserve   pressure.reserve: the room that is to be left
    ceiling   what the pool may hold now; the shrinker keeps it below that, in the background

    room               the pool
    above 2 reserves   grows back: its ceiling rises by pressure.growth a second, until it is no longer needed
    1 to 2 reserves    holds: what it is given it gives up, and as much again as room falls below the lowest seen (memory-neutral)
    below the reserve  shrinks: by what is missing to the reserve, or 1/64 of the pool if that is more; each further step in a
                       row is twice as large, a quarter of the pool at most
    below a quarter    the same, whatever is loaded again
    of the reserve

It relaxes at once where 4 reserves are left; nearer to the border only after at least 2 1/8 reserves were left for half a second.
So programs that take and give back memory near the border do not make it alternate.

Below 2 reserves, and until it relaxes, the pool takes no frame that the kernel would have to find memory for: a store that finds
none waits for one that is given back.

A stall (PSI: something waits for memory a tenth of the time) while there is less than 2 reserves counts as room below the reserve.
Stalls with more room than that are somebody's own limit, which shrinking does not help.

A step is half of what it was after each look without pressure. If more than half of what was released since the look before was
loaded again (refaults), the next step is not larger than the last; below a quarter of the reserve that does not count.

Knows nothing of tiers, threads and files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

#: Shares of the pool: the least step and the largest.
LEAST_STEP: Final = 1 / 64
LARGEST_STEP: Final = 1 / 4
#: What is asked for now is there one look and one write later. A program that has to catch up takes 4 GB a second, and one that
#: once meets a limit is made to wait by the kernel for 0.1 s and longer.
AHEAD_S: Final = 0.03
#: Room below this share of the reserve is critical.
CRITICAL_SHARE: Final = 1 / 4
#: Refaults by release above which steps do not grow.
REFAULT_SHARE: Final = 0.5
#: It relaxes at once with so many reserves, and with so many after CALM_S.
FAR: Final = 4
NEAR: Final = 2 + 1 / 8
CALM_S: Final = 0.5
RELAXED: Final = "relaxed"
HOLDING: Final = "holding"
SHRINKING: Final = "shrinking"
CRITICAL: Final = "critical"


@dataclass(frozen=True, slots=True)
class Settings:
    """`reserve_bytes` of room to leave; `growth_bytes` a second that the ceiling rises when there is room again."""

    reserve_bytes: int
    growth_bytes: int


@dataclass(frozen=True, slots=True)
class Look:
    """What one look found: seconds of any clock that does not go back, bytes, and whether something stalled for memory.

    `top` is what the pool may hold without pressure. `released` and `refaulted` are bytes of pages since the start: those that left
    RAM for the tier, and those loaded from there again. `given` is memory that the pool gave back to the system since the start.
    """

    at: float
    room: int
    pool: int
    top: int
    released: int = 0
    refaulted: int = 0
    given: int = 0
    stalled: bool = False


@dataclass(frozen=True, slots=True)
class Control:
    """What the pool is to do: hold no more than `ceiling`.

    `lowest` is the least room seen since there was enough, `demand` what others take, in bytes a second; `look` is what this comes
    from. `calm_since` is the first of the looks without a break at which there was enough to relax soon.
    """

    zone: str = RELAXED
    ceiling: float = math.inf
    step: float = 0.0
    lowest: float = math.inf
    demand: float = 0.0
    look: Look = Look(0.0, 0, 0, 0)
    calm_since: float = math.inf

    @property
    def is_calming(self) -> bool:
        """Whether it relaxes soon, if nothing changes."""
        return self.zone != RELAXED and not math.isinf(self.calm_since)


def control(before: Control, look: Look, settings: Settings) -> Control:
    """What the pool is to do after `look`, having done `before`."""
    demand = min(_demand(before, look), settings.reserve_bytes / AHEAD_S)  # more counts for no more, nor for longer
    ahead = replace(look, room=look.room - int(demand * AHEAD_S))
    calm_since = _calm_since(before, ahead, settings)
    zone = zone_of(ahead, settings)
    if zone == RELAXED and before.zone != RELAXED and look.at - calm_since < CALM_S and ahead.room < FAR * settings.reserve_bytes:
        zone = HOLDING
    lowest = math.inf if zone == RELAXED else min(before.lowest, ahead.room)
    matched = _held(before, look, zone) - max(min(before.lowest, 2 * settings.reserve_bytes) - ahead.room, 0.0)
    if zone == RELAXED:
        step, ceiling = _decayed(before, look), _grown(before, look, settings)
    elif zone == HOLDING:
        step, ceiling = _decayed(before, look), matched
    else:
        step = _next_step(before, ahead, settings, zone)
        ceiling = min(matched, look.pool - step)
    return Control(zone, max(ceiling, 0.0), step, lowest, demand, look, calm_since)


def _demand(before: Control, look: Look) -> float:
    """Bytes a second that others took since the look before, or half of what they took before that."""
    seconds = look.at - before.look.at
    given = look.given - before.look.given
    shrunk = min(given, max(before.look.pool - before.ceiling, 0.0))  # the rest had died
    grown = max(look.pool - before.look.pool + given, 0)
    taken = before.look.room - look.room + shrunk - grown
    return max(taken / seconds if seconds > 0 else 0.0, before.demand / 2)


def _calm_since(before: Control, ahead: Look, settings: Settings) -> float:
    """Since when there has been enough to relax soon; infinity if there is not."""
    return min(before.calm_since, ahead.at) if ahead.room >= NEAR * settings.reserve_bytes else math.inf


def zone_of(look: Look, settings: Settings) -> str:
    """RELAXED, HOLDING, SHRINKING or CRITICAL."""
    reserve = settings.reserve_bytes
    if look.room < reserve * CRITICAL_SHARE:
        return CRITICAL
    if look.room < reserve or (look.stalled and look.room < 2 * reserve):
        return SHRINKING
    return HOLDING if look.room < 2 * reserve else RELAXED


def _held(before: Control, look: Look, zone: str) -> float:
    """What the pool may keep if no more is taken.

    While it holds, that is what it held at first, also after pages of it died. What was still to be shrunk when the pressure ended
    need not be any more.
    """
    if zone == before.zone == HOLDING:
        return before.ceiling
    if zone == HOLDING and before.zone in (SHRINKING, CRITICAL):
        return look.pool
    return min(before.ceiling, look.pool)


def _next_step(before: Control, look: Look, settings: Settings, zone: str) -> float:
    """Bytes to shrink by."""
    first = max(settings.reserve_bytes - look.room, look.pool * LEAST_STEP)
    if not before.step:
        step = first
    elif zone != CRITICAL and _is_refaulted(before, look):
        step = min(first, before.step)
    else:
        step = max(first, 2 * before.step)
    return min(step, look.pool * LARGEST_STEP)


def _is_refaulted(before: Control, look: Look) -> bool:
    """Whether most of what was released since the look before was loaded again."""
    released = look.released - before.look.released
    return released > 0 and look.refaulted - before.look.refaulted > REFAULT_SHARE * released


def _decayed(before: Control, look: Look) -> float:
    half = before.step / 2
    return half if half > look.pool * LEAST_STEP else 0.0


def _grown(before: Control, look: Look, settings: Settings) -> float:
    """The ceiling after a while with room; none at all once it has reached the top."""
    ceiling = before.ceiling + settings.growth_bytes * max(look.at - before.look.at, 0.0)
    return math.inf if ceiling >= look.top else ceiling
