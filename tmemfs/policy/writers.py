"""How many threads write segments back at once: as many as the disk gains by, found by trial. Pure: time is passed in.

One thread keeps an ordinary disk busy. A disk with long latency, such as a volume in a cloud, takes more bytes per second if
several writes are under way. So now and then another number writes for one measurement:

    all        they stay if the rate rises by GAIN. Not one more: on ext4 one of two waits until the other's write has ended
               (tiers/blocks.py), so two gain nothing though three do
    one less   stays if the rate keeps SAME of what it was: fewer writes are ahead of a load, and fewer segments are held

Between them is a gap, so that noise does not make the number alternate. After a trial that was given up, the next one comes after
twice as long, so a disk that gains nothing is hardly ever asked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from tmemfs.units import SEGMENT_BYTES

#: On a quick disk three threads are a tenth faster than one, and take a third more CPU per byte: that does not pay.
GAIN: Final = 1.25
SAME: Final = 0.97
#: A measurement is over after so many bytes and seconds: a limited disk takes its bytes in bursts of 0.1 s.
LEAST_BYTES: Final = 16 * SEGMENT_BYTES
LEAST_S: Final = 0.5
#: Seconds from one trial to the next: at first, and at most.
FIRST_PAUSE_S: Final = 2.0
LONGEST_PAUSE_S: Final = 128.0


@dataclass(frozen=True, slots=True)
class Writers:
    """`count` threads are to write now, of `least` to `most`; without a trial `settled` of them.

    `rate` is what those wrote, in bytes per second. `written` and `seconds` are the measurement under way. The next trial is one of
    all threads, if it `goes_up`, or of one less; it begins after `next_at`.
    """

    least: int
    most: int
    count: int
    settled: int
    rate: float = 0.0
    written: int = 0
    seconds: float = 0.0
    goes_up: bool = True
    pause_s: float = FIRST_PAUSE_S
    next_at: float = 0.0

    @classmethod
    def first(cls, least: int, most: int, start: int) -> Writers:
        """Before anything was measured: `start` threads write."""
        return cls(least, most, start, start)


def after(before: Writers, written_bytes: int, seconds: float, now: float) -> Writers:
    """Who is to write next: at `now`, `before.count` threads have written `written_bytes` in `seconds`."""
    measured = replace(before, written=before.written + written_bytes, seconds=before.seconds + seconds)
    if measured.written < LEAST_BYTES or measured.seconds < LEAST_S:
        return measured
    rate = measured.written / measured.seconds
    done = replace(measured, written=0, seconds=0.0)
    if before.count == before.settled:
        return _tried(replace(done, rate=rate), now)
    share = GAIN if before.count > before.settled else SAME
    if rate >= share * before.rate:  # go on in this direction
        pause_s = FIRST_PAUSE_S
        return replace(done, settled=before.count, rate=rate, pause_s=pause_s, next_at=now + pause_s)
    pause_s = min(2 * before.pause_s, LONGEST_PAUSE_S)
    return replace(done, count=before.settled, goes_up=not before.goes_up, pause_s=pause_s, next_at=now + pause_s)


def _tried(settled: Writers, now: float) -> Writers:
    """`settled`, whose rate was just measured, with the next trial if it is time for one."""
    if now < settled.next_at or settled.least == settled.most:
        return settled
    goes_up = settled.settled < settled.most and (settled.goes_up or settled.settled == settled.least)
    return replace(settled, count=settled.most if goes_up else settled.settled - 1, goes_up=goes_up)
