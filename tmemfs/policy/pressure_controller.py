"""The pressure controller: how much the pool may hold while memory is short.

Pure: `decide` takes a sample of the system and the decision before, and returns the next decision. Time is passed in.

    headroom  memory that is available without the pool: MemAvailable, and half of what can still be swapped out, of the system or
              below the limit of the daemon's cgroup, whichever is less. Of that, what will be left in 30 ms if others go on taking
              memory as fast as they do now; the forecast lowers it by one reserve at most.
    reserve   pressure.reserve: the headroom that is to be left to others.
    ceiling   what the pool may hold now. The shrinker keeps the pool below it, in the background.

    headroom           state      the pool
    above 2 reserves   relaxed    grows back: its ceiling rises by pressure.growth per second until it is no longer needed.
    1 to 2 reserves    holding    stays as it is: it releases as much as it is given, and as much again as headroom falls below the
                                  lowest seen (memory-neutral).
    below the reserve  shrinking  shrinks by what is missing to the reserve, or by 1/64 of the pool if that is more. Each further
                                  step in a row is twice as large, up to a quarter of the pool.
    below a quarter    critical   the same, whatever is loaded again.
    of the reserve

The pool relaxes at once where 4 reserves are left. Nearer to the border it relaxes only after at least 2 1/8 reserves were left for
half a second, so that programs which take and release memory near the border do not make it alternate.

Below 2 reserves, and until it relaxes, the pool takes no frame that the kernel would have to find memory for. A store that finds no
free frame waits for one that is released.

A stall (PSI: some task waits for memory a tenth of the time) while there are less than 2 reserves counts as headroom below the
reserve. A stall with more headroom comes from the limit of another cgroup, which shrinking does not help.

After each sample without pressure the step is halved. If more than half of what was released since the sample before was loaded
again (refaults), the next step is not larger than the last. Below a quarter of the reserve that does not count.

Knows nothing of tiers, threads and files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

#: Shares of the pool: the least step and the largest.
LEAST_STEP: Final = 1 / 64
LARGEST_STEP: Final = 1 / 4
#: Memory that is asked of the pool now is there one sample and one write later. Meanwhile a program may take 4 GB per second, and
#: the kernel makes one that has once met a limit wait for 0.1 s and longer (docs/decisions/0013).
AHEAD_S: Final = 0.03
#: Headroom below this share of the reserve is critical.
CRITICAL_SHARE: Final = 1 / 4
#: Refaults per release above which steps do not grow.
REFAULT_SHARE: Final = 0.5
#: Reserves of headroom with which it relaxes at once (FAR), or after CALM_S (NEAR).
FAR: Final = 4
NEAR: Final = 2 + 1 / 8
CALM_S: Final = 0.5
RELAXED: Final = "relaxed"
HOLDING: Final = "holding"
SHRINKING: Final = "shrinking"
CRITICAL: Final = "critical"


@dataclass(frozen=True, slots=True)
class Settings:
    """`reserve_bytes` of headroom to leave; `growth_bytes` per second that the ceiling rises when there is headroom again."""

    reserve_bytes: int
    growth_bytes: int


@dataclass(frozen=True, slots=True)
class Sample:
    """What one sample found: seconds of any clock that does not run backwards, bytes, and whether something stalled for memory.

    `top` is what the pool may hold without pressure. `released` and `refaulted` are bytes of pages since the start: those that left
    RAM for the tier, and those loaded from there again. `given` is memory that the pool released to the system since the start.
    """

    at: float
    headroom: int
    pool: int
    top: int
    released: int = 0
    refaulted: int = 0
    given: int = 0
    stalled: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What the pool is to do: hold no more than `ceiling`.

    `lowest` is the least headroom seen since there was enough, `demand` what others take, in bytes per second. `sample` is what
    this was decided from. `calm_since` is the time of the first in an unbroken row of samples with enough headroom to relax soon.
    """

    state: str = RELAXED
    ceiling: float = math.inf
    step: float = 0.0
    lowest: float = math.inf
    demand: float = 0.0
    sample: Sample = Sample(0.0, 0, 0, 0)
    calm_since: float = math.inf

    @property
    def is_calming(self) -> bool:
        """Whether it relaxes soon, if nothing changes."""
        return self.state != RELAXED and not math.isinf(self.calm_since)


def decide(before: Decision, sample: Sample, settings: Settings) -> Decision:
    """What the pool is to do after `sample`, having done `before`."""
    # Capped, so that one burst neither lowers the headroom by more than a reserve nor takes longer to be forgotten.
    demand = min(_demand(before, sample), settings.reserve_bytes / AHEAD_S)
    ahead = replace(sample, headroom=sample.headroom - int(demand * AHEAD_S))
    calm_since = _calm_since(before, ahead, settings)
    state = _next_state(before, ahead, calm_since, settings)
    lowest = math.inf if state == RELAXED else min(before.lowest, ahead.headroom)
    # Only what falls below the lowest headroom seen is released: a fall that was matched once is not matched again.
    matched = _held(before, sample, state) - max(min(before.lowest, 2 * settings.reserve_bytes) - ahead.headroom, 0.0)
    if state == RELAXED:
        step, ceiling = _decayed(before, sample), _grown(before, sample, settings)
    elif state == HOLDING:
        step, ceiling = _decayed(before, sample), matched
    else:
        step = _next_step(before, ahead, settings, state)
        ceiling = min(matched, sample.pool - step)
    return Decision(state, max(ceiling, 0.0), step, lowest, demand, sample, calm_since)


def _next_state(before: Decision, ahead: Sample, calm_since: float, settings: Settings) -> str:
    """The state of `ahead`, except that the pool goes on holding near the border until it has been calm for CALM_S."""
    state = state_of(ahead, settings)
    is_near = ahead.headroom < FAR * settings.reserve_bytes and ahead.at - calm_since < CALM_S
    return HOLDING if state == RELAXED and before.state != RELAXED and is_near else state


def _demand(before: Decision, sample: Sample) -> float:
    """Bytes per second that others took since the sample before, or half of what they took before that."""
    seconds = sample.at - before.sample.at
    given = sample.given - before.sample.given
    shrunk = min(given, max(before.sample.pool - before.ceiling, 0.0))  # the rest was released because it became empty
    grown = max(sample.pool - before.sample.pool + given, 0)
    # What the pool released has raised the headroom, and what it grew by has lowered it: neither is demand of others.
    taken = before.sample.headroom - sample.headroom + shrunk - grown
    return max(taken / seconds if seconds > 0 else 0.0, before.demand / 2)


def _calm_since(before: Decision, ahead: Sample, settings: Settings) -> float:
    """Since when there has been enough to relax soon; infinity if there is not."""
    return min(before.calm_since, ahead.at) if ahead.headroom >= NEAR * settings.reserve_bytes else math.inf


def state_of(sample: Sample, settings: Settings) -> str:
    """RELAXED, HOLDING, SHRINKING or CRITICAL."""
    reserve = settings.reserve_bytes
    if sample.headroom < reserve * CRITICAL_SHARE:
        return CRITICAL
    if sample.headroom < reserve or (sample.stalled and sample.headroom < 2 * reserve):
        return SHRINKING
    return HOLDING if sample.headroom < 2 * reserve else RELAXED


def _held(before: Decision, sample: Sample, state: str) -> float:
    """What the pool may keep if no more is taken.

    While it holds, that is what it held at first, also after pages of it were invalidated. What was still to be shrunk when the
    pressure ended need not be any more.
    """
    if state == before.state == HOLDING:
        return before.ceiling
    if state == HOLDING and before.state in (SHRINKING, CRITICAL):
        return sample.pool
    return min(before.ceiling, sample.pool)


def _next_step(before: Decision, sample: Sample, settings: Settings, state: str) -> float:
    """Bytes to shrink by."""
    first = max(settings.reserve_bytes - sample.headroom, sample.pool * LEAST_STEP)
    if not before.step:
        step = first
    # What was released is used: more of it would be loaded again, which takes memory and time from all.
    elif state != CRITICAL and _is_refaulted(before, sample):
        step = min(first, before.step)
    else:
        step = max(first, 2 * before.step)
    return min(step, sample.pool * LARGEST_STEP)


def _is_refaulted(before: Decision, sample: Sample) -> bool:
    """Whether most of what was released since the sample before was loaded again."""
    released = sample.released - before.sample.released
    return released > 0 and sample.refaulted - before.sample.refaulted > REFAULT_SHARE * released


def _decayed(before: Decision, sample: Sample) -> float:
    """The step after a sample without pressure: half of it, and none once it is below the least one."""
    half = before.step / 2
    return half if half > sample.pool * LEAST_STEP else 0.0


def _grown(before: Decision, sample: Sample, settings: Settings) -> float:
    """The ceiling after a while with headroom; none at all once it has reached the top."""
    ceiling = before.ceiling + settings.growth_bytes * max(sample.at - before.sample.at, 0.0)
    return math.inf if ceiling >= sample.top else ceiling
