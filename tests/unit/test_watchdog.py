"""When a worker hangs, by its words alone."""

from __future__ import annotations

from dataclasses import replace

from tmemfs.fuse.handling import IDLE
from tmemfs.watchdog import Signs, Watchdog

LIMIT_S = 8
IDLE_SIGNS = Signs(has_unread=False, handling=(4 | IDLE, 0), pulse=0, tier_begun=0, tier_ended=0)


def look(watchdog: Watchdog, signs: Signs, times: range, pulses: bool = True) -> bool:
    """Show `signs` at `times`, with an event loop that `pulses`; whether the worker hangs then."""
    for now in times:
        watchdog.look(replace(signs, pulse=now if pulses else 0), now)
    return watchdog.hangs(LIMIT_S, times[-1])


def test_one_without_requests_never_hangs() -> None:
    assert not look(Watchdog(0), IDLE_SIGNS, range(1000), pulses=False)


def test_requests_that_nobody_reads_are_a_hang_after_the_limit() -> None:
    watchdog, waiting = Watchdog(0), replace(IDLE_SIGNS, has_unread=True)
    assert not look(watchdog, waiting, range(LIMIT_S))
    assert look(watchdog, waiting, range(LIMIT_S, LIMIT_S + 1))
    assert watchdog.silent_s(LIMIT_S) == LIMIT_S


def test_a_request_that_a_thread_does_not_finish_is_a_hang() -> None:
    assert look(Watchdog(0), replace(IDLE_SIGNS, handling=(4 | IDLE, 6)), range(LIMIT_S + 1))


def test_one_that_goes_on_does_not_hang() -> None:
    watchdog = Watchdog(0)
    for now in range(1000):
        watchdog.look(replace(IDLE_SIGNS, has_unread=True, handling=(now, 0)), now)
        assert not watchdog.hangs(LIMIT_S, now)


def test_a_tier_that_does_not_answer_is_no_hang_while_the_event_loop_runs() -> None:
    waiting = replace(IDLE_SIGNS, handling=(4 | IDLE, 6), tier_begun=5, tier_ended=4)
    assert not look(Watchdog(0), waiting, range(1000))
    assert look(Watchdog(0), waiting, range(1000), pulses=False)


def test_a_tier_that_answers_is_no_reason_to_wait() -> None:
    watchdog = Watchdog(0)
    for now in range(LIMIT_S + 1):
        watchdog.look(replace(IDLE_SIGNS, has_unread=True, pulse=now, tier_begun=now + 1, tier_ended=now), now)
    assert watchdog.hangs(LIMIT_S, LIMIT_S)
