"""Idle CPUs are kept awake in bursts, as the mode says, by way of a device that a file plays."""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tmemfs import options
from tmemfs.cli import doctor
from tmemfs.errors import BadValue, Refused
from tmemfs.jobs.latency import MODES, Latency, parse_latency
from tmemfs.policy.bursts import BURST_PER_S, BURST_REQUESTS, LONGEST_LOOK_S, LOOK_S
from tmemfs.system import cpu_latency
from tmemfs.system.cpu_latency import check_device, idle

AWAKE, NO_LIMIT = 0, -1
#: A little more than a look: sums of the clock are rounded.
ONE_LOOK_S = LOOK_S * 1.01
LONGEST_S = LONGEST_LOOK_S * 1.01


class Machine:
    """A device, a clock that the test moves, and the requests that have come.

    pytest-trio uses the clock only if it is an argument of the test.
    """

    def __init__(self, device: Path, clock: MockClock) -> None:
        self.device = device
        self.clock = clock
        self.requests = 0
        device.write_bytes(struct.pack("=i", NO_LIMIT))

    @property
    def asked(self) -> int:
        """What was written to the device last."""
        return int(struct.unpack("=i", self.device.read_bytes())[0])

    @property
    def is_open(self) -> bool:
        """Whether a request is there: the kernel ends it with its descriptor."""
        links = (Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
        return any(os.path.exists(link) and os.path.samefile(link, self.device) for link in links)

    def latency(self, mode: str = "auto") -> Latency:
        """That of a worker."""
        return Latency(mode, self.device, self.clock.current_time)

    def come(self, latency: Latency, requests: int) -> None:
        """As the leader does."""
        for _ in range(requests):
            self.requests += 1
            if latency.is_armed:
                latency.note()

    @asynccontextmanager
    async def running(self, latency: Latency) -> AsyncIterator[None]:
        """While the job runs."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(latency.run, lambda: self.requests)
            await wait_all_tasks_blocked()
            yield
            nursery.cancel_scope.cancel()

    async def pass_time(self, seconds: float) -> None:
        """Let the job do what it does meanwhile."""
        self.clock.jump(seconds)
        await wait_all_tasks_blocked()


@pytest.fixture
def machine(tmp_path: Path, mock_clock: MockClock) -> Machine:
    return Machine(tmp_path / "device", mock_clock)


async def test_a_burst_keeps_cpus_awake_and_some_milliseconds_later_they_may_halt(machine: Machine, mock_clock: MockClock) -> None:
    latency = machine.latency()
    async with machine.running(latency):
        assert (machine.asked, latency.is_held, latency.is_armed) == (NO_LIMIT, False, True)
        machine.come(latency, BURST_REQUESTS)
        assert not latency.is_armed
        await wait_all_tasks_blocked()
        assert (machine.asked, latency.is_held, latency.bursts) == (AWAKE, True, 1)
        await machine.pass_time(ONE_LOOK_S)
        assert (machine.asked, latency.is_held, latency.is_armed) == (NO_LIMIT, False, True)
        assert latency.held_s == pytest.approx(ONE_LOOK_S)


async def test_it_lasts_while_requests_come(machine: Machine, mock_clock: MockClock) -> None:
    latency = machine.latency()
    async with machine.running(latency):
        machine.come(latency, BURST_REQUESTS)
        await wait_all_tasks_blocked()
        for _ in range(50):
            machine.come(latency, int(LONGEST_LOOK_S * BURST_PER_S))
            await machine.pass_time(LONGEST_S)
            assert (machine.asked, latency.is_armed) == (AWAKE, False)
        assert latency.held_s == pytest.approx(50 * LONGEST_S)
        await machine.pass_time(LONGEST_S)
        assert (machine.asked, latency.bursts) == (NO_LIMIT, 1)


async def test_a_request_per_second_keeps_nobody_awake_and_does_not_wake_the_job(
    machine: Machine, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[int] = []
    monkeypatch.setattr(os, "eventfd_write", lambda fd, value: woken.append(value))
    latency = machine.latency()
    async with machine.running(latency):
        for _ in range(100):
            machine.come(latency, 1)
            await machine.pass_time(1.0)
        assert not woken
        assert (machine.asked, latency.bursts, latency.is_armed) == (NO_LIMIT, 0, True)


async def test_each_burst_counts(machine: Machine, mock_clock: MockClock) -> None:
    latency = machine.latency()
    async with machine.running(latency):
        for number in range(1, 4):
            machine.come(latency, 1000)
            await wait_all_tasks_blocked()
            assert latency.bursts == number and machine.asked == AWAKE
            await machine.pass_time(ONE_LOOK_S)
            assert machine.asked == NO_LIMIT


async def test_off_has_no_request_and_is_never_told(machine: Machine, mock_clock: MockClock) -> None:
    latency = machine.latency("off")
    async with machine.running(latency):
        machine.come(latency, 1000)
        await machine.pass_time(LOOK_S)
        assert not machine.is_open and not latency.is_armed and latency.is_held is False and latency.bursts == 0


async def test_always_needs_no_requests(machine: Machine, mock_clock: MockClock) -> None:
    latency = machine.latency("always")
    async with machine.running(latency):
        await machine.pass_time(3600)
        assert machine.asked == AWAKE and latency.is_held and not latency.is_armed
        assert latency.held_s == pytest.approx(3600)


async def test_the_request_ends_with_the_job_and_the_next_one_takes_it_up_again(machine: Machine, mock_clock: MockClock) -> None:
    latency = machine.latency("always")
    for _ in range(2):
        async with machine.running(latency):
            assert machine.is_open and latency.is_held
        assert not machine.is_open and latency.is_held is False


@pytest.mark.parametrize("before", MODES)
@pytest.mark.parametrize("after", MODES)
@pytest.mark.parametrize("in_burst", [False, True])
async def test_a_mode_takes_effect_at_once(
    machine: Machine, mock_clock: MockClock, before: str, after: str, in_burst: bool
) -> None:
    latency = machine.latency(before)
    async with machine.running(latency):
        machine.come(latency, BURST_REQUESTS if in_burst else 0)
        await wait_all_tasks_blocked()
        latency.set_mode(after)
        assert latency.mode == after
        for _ in range(2):
            assert (latency.is_held, latency.is_armed, machine.is_open) == (after == "always", after == "auto", after != "off")
            assert after == "off" or machine.asked == (AWAKE if after == "always" else NO_LIMIT)
            await machine.pass_time(2 * LOOK_S)


async def test_a_mode_that_is_set_before_the_job_runs_is_kept(machine: Machine, mock_clock: MockClock) -> None:
    latency = machine.latency()
    latency.set_mode("always")
    async with machine.running(latency):
        assert latency.is_held and machine.asked == AWAKE
        latency.set_mode("auto")
        machine.come(latency, BURST_REQUESTS)
        await wait_all_tasks_blocked()
        assert machine.asked == AWAKE


async def test_without_the_device_auto_does_nothing_and_says_so_once(
    machine: Machine, mock_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    machine.device.unlink()
    latency = machine.latency()
    for _ in range(2):
        async with machine.running(latency):
            machine.come(latency, 1000)
            await machine.pass_time(LOOK_S)
            assert latency.is_held is None and not latency.is_armed and latency.bursts == 0
        latency.set_mode("auto")
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1 and "No such file or directory" in said[0]


async def test_without_the_device_always_is_refused_and_changes_nothing(machine: Machine, mock_clock: MockClock) -> None:
    machine.device.unlink()
    latency = machine.latency("off")
    async with machine.running(latency):
        with pytest.raises(Refused, match=r"\(No such file or directory\): give the daemon .*/device, or choose auto"):
            latency.set_mode("always")
        assert latency.mode == "off" and latency.is_held is False


async def test_a_worker_that_lacks_the_device_serves_without(machine: Machine, mock_clock: MockClock) -> None:
    machine.device.unlink()
    latency = machine.latency("always")
    async with machine.running(latency):
        assert latency.mode == "always" and latency.is_held is None
        machine.device.touch()
        latency.set_mode("always")
        assert latency.is_held is True and machine.asked == AWAKE


async def test_a_request_is_not_failed_because_the_job_cannot_be_woken(
    machine: Machine, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, value: int) -> None:
        raise OSError(errno.EAGAIN, "full")

    latency = machine.latency()
    async with machine.running(latency):
        monkeypatch.setattr(os, "eventfd_write", fail)
        machine.come(latency, 1000)


@pytest.mark.parametrize("text", ["", "on", "AUTO", "always off", "0"])
def test_what_is_no_mode_is_refused(text: str) -> None:
    with pytest.raises(BadValue, match="choose auto, off or always"):
        parse_latency(text)


@pytest.mark.parametrize("mode", MODES)
def test_only_always_is_refused_at_the_start_where_the_device_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(options, "require_root", lambda: None)
    monkeypatch.setattr(options, "FUSE_DEVICE", Path(os.devnull))
    monkeypatch.setattr(options, "check_device", refused)
    asked = options.Options(tmp_path, 1 << 20, latency=mode)
    if mode == "always":
        with pytest.raises(Refused, match="cannot be kept awake"):
            options.check(asked)
    else:
        options.check(asked)
    with pytest.raises(BadValue):
        options.check(replace(asked, latency="on"))


def test_the_check_of_the_device_asks_for_nothing(tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.write_bytes(b"")
    check_device(device)
    assert device.read_bytes() == b""


def idle_files(place: Path, driver: str | None, governor: str, poll_ns: str | None) -> tuple[Path, Path]:
    """The kernel's files."""
    for name, text in (("current_driver", driver), ("current_governor_ro", governor), ("poll_ns", poll_ns)):
        if text is not None:
            (place / name).write_text(f"{text}\n")
    return place, place / "poll_ns"


@pytest.mark.parametrize(
    ("driver", "governor", "poll_ns", "expected"),
    [
        ("haltpoll", "haltpoll", "0", cpu_latency.Idle("haltpoll", "haltpoll", 0)),
        ("haltpoll", "haltpoll", None, cpu_latency.Idle("haltpoll", "haltpoll", None)),
        ("intel_idle", "menu", "200000", cpu_latency.Idle("intel_idle", "menu", None)),
        (None, "menu", None, cpu_latency.Idle("none", "menu", None)),
    ],
)
def test_what_idle_cpus_do_is_read_from_the_kernel(
    tmp_path: Path, driver: str | None, governor: str, poll_ns: str | None, expected: cpu_latency.Idle
) -> None:
    assert idle(*idle_files(tmp_path, driver, governor, poll_ns)) == expected


def refused() -> None:
    """The device of a container."""
    raise Refused("idle CPUs cannot be kept awake (Permission denied): give the daemon /dev/cpu_dma_latency, or choose auto")


@pytest.mark.parametrize(
    ("poll_ns", "check", "ok", "found", "advice"),
    [
        (200000, lambda: None, True, "; kept awake in bursts", ""),
        (0, lambda: None, True, "with guest_halt_poll_ns=0; kept awake in bursts", "echo 200000 > /sys/module/haltpoll"),
        (
            200000,
            refused,
            None,
            "; idle CPUs cannot be kept awake (Permission denied)",
            "give the daemon /dev/cpu_dma_latency, or choose auto",
        ),
        (
            None,
            refused,
            None,
            "driver acpi_idle, governor haltpoll; idle CPUs cannot",
            "give the daemon /dev/cpu_dma_latency, or choose auto",
        ),
    ],
)
def test_the_doctor_says_what_idle_cpus_do_and_what_would_help(
    monkeypatch: pytest.MonkeyPatch, poll_ns: int | None, check: Callable[[], None], ok: bool | None, found: str, advice: str
) -> None:
    monkeypatch.setattr(cpu_latency, "idle", lambda: cpu_latency.Idle("acpi_idle", "haltpoll", poll_ns))
    monkeypatch.setattr(cpu_latency, "check_device", check)
    monkeypatch.setattr(doctor, "is_root", lambda: True)
    said = doctor._wake_ups("wake-ups")
    assert said.ok is ok and found in said.found and said.advice.startswith(advice) and bool(said.advice) == bool(advice)


def test_the_doctor_tells_an_ordinary_user_that_only_root_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_latency, "check_device", refused)
    monkeypatch.setattr(doctor, "is_root", lambda: False)
    assert doctor._wake_ups("wake-ups").advice == "only root may: run with sudo"
