"""Jobs: a job that raises is counted, reported and started again, and no failure leaves the supervision."""

from __future__ import annotations

import logging

import pytest
import trio
from trio.testing import MockClock

from tmemfs.jobs.supervision import FIRST_PAUSE_S, HEALTHY_S, LONGEST_PAUSE_S, Job, Jobs


class Failing:
    """A job that raises `error` at once the first `times` times, and then runs."""

    def __init__(self, error: BaseException, times: int) -> None:
        self.error = error
        self.times = times
        self.started: list[float] = []

    async def run(self) -> None:
        self.started.append(trio.current_time())
        if len(self.started) <= self.times:
            raise self.error
        await trio.sleep_forever()


@pytest.fixture(autouse=True)
def one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmemfs.jobs.supervision.time.monotonic", trio.current_time)


async def test_a_job_that_raises_is_started_again_after_pauses_that_double(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    failing, jobs = Failing(ValueError("no such\nthing"), times=9), Jobs()
    nursery.start_soon(jobs.run, (Job("tested", failing.run),))
    await trio.sleep(30)
    pauses = [after - before for before, after in zip(failing.started, failing.started[1:], strict=False)]
    assert pauses[:4] == pytest.approx([FIRST_PAUSE_S * 2**power for power in range(4)])
    assert pauses[-1] == pytest.approx(LONGEST_PAUSE_S) and len(failing.started) == 10
    assert jobs.failures == 9
    assert jobs.degraded() == ["job tested failed 9 times: ValueError: no such thing"]
    nursery.cancel_scope.cancel()


async def test_a_job_that_has_run_for_long_is_healthy_again(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    failing, jobs = Failing(ValueError(), times=1), Jobs()
    nursery.start_soon(jobs.run, (Job("tested", failing.run),))
    await trio.sleep(HEALTHY_S - 1)
    assert jobs.degraded() == ["job tested failed 1 times: ValueError"]
    await trio.sleep(2)
    assert not jobs.degraded() and jobs.failures == 1
    nursery.cancel_scope.cancel()


async def test_the_other_jobs_go_on(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    good, bad = Failing(ValueError(), times=0), Failing(ValueError(), times=5)
    nursery.start_soon(Jobs().run, (Job("good", good.run), Job("bad", bad.run)))
    await trio.sleep(20)
    assert len(good.started) == 1 and len(bad.started) == 6
    nursery.cancel_scope.cancel()


async def test_an_error_of_a_nursery_is_named_by_its_first(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    failing, jobs = Failing(ExceptionGroup("some", [ExceptionGroup("more", [OSError(5, "gone")])]), times=1), Jobs()
    nursery.start_soon(jobs.run, (Job("tested", failing.run),))
    await trio.sleep(1)
    assert jobs.degraded() == ["job tested failed 1 times: OSError: [Errno 5] gone"]
    nursery.cancel_scope.cancel()


async def test_a_part_that_depends_on_a_job_is_told_and_may_fail_too(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    told, failing, jobs = list[str](), Failing(ValueError("why"), times=2), Jobs()

    def tell(why: str) -> None:
        told.append(why)
        raise KeyError("injected")

    nursery.start_soon(jobs.run, (Job("tested", failing.run, tell),))
    await trio.sleep(1)
    assert told == ["job tested failed: ValueError: why"] * 2 and len(failing.started) == 3
    nursery.cancel_scope.cancel()


async def test_a_job_that_fails_for_days_does_not_fill_the_log(
    autojump_clock: MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Failing(ValueError(), times=1 << 30)
    nursery.start_soon(Jobs().run, (Job("tested", failing.run),))
    with caplog.at_level(logging.ERROR):
        await trio.sleep(3 * 3600)
    assert len(failing.started) > 2000
    assert len(caplog.records) == len(failing.started).bit_length() and all(record.exc_info for record in caplog.records)
    nursery.cancel_scope.cancel()


async def test_run_returns_when_all_jobs_have() -> None:
    async def return_at_once() -> None:
        await trio.lowlevel.checkpoint()

    await Jobs().run((Job("short", return_at_once),))


class Unprintable(Exception):
    """An error that cannot be described."""

    def __str__(self) -> str:
        raise ValueError("injected")


async def test_an_error_that_cannot_be_described_does_not_end_the_supervision(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    failing, jobs = Failing(Unprintable(), times=2), Jobs()
    nursery.start_soon(jobs.run, (Job("tested", failing.run),))
    await trio.sleep(1)
    assert len(failing.started) == 3
    assert jobs.degraded() == ["job tested failed 2 times: Unprintable"]
    nursery.cancel_scope.cancel()
