"""What is said of a worker by a status region alone, and what a reader makes of a region."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import HANG_S
from tmemfs.cli import checks, health
from tmemfs.cli.health import Attendant, Health
from tmemfs.errors import NoAnswer
from tmemfs.services import restarts_degrade
from tmemfs.system import runtime
from tmemfs.system.status_region import Cause, Death, State, Status, StatusRegion, Word, read_status

SECOND = 10**9
NOW = 1000 * SECOND
SERVING = {
    Word.STATE: State.SERVING,
    Word.SUPERVISOR_PID: 40,
    Word.WORKER_PID: 41,
    Word.GENERATION: 3,
    Word.STARTED_NS: NOW - 500 * SECOND,
    Word.ANSWERED_NS: NOW - 4 * SECOND,
    Word.IS_SERVING: 1,
    Word.PULSE: 100,
    Word.PULSE_NS: NOW - SECOND // 2,
    Word.WATCHDOG_MS: 30000,
}
DEATH = Death(NOW - 200 * SECOND, Cause.CRASHED, "worker 2 (process 39) was ended by SIGSEGV")


def status_of(deaths: tuple[Death, ...] = (), **changes: int) -> Status:
    words = {**SERVING, **{Word[name]: value for name, value in changes.items()}}
    for death in deaths:
        words[death.cause.counter] = words.get(death.cause.counter, 0) + 1
    return Status([words.get(Word(at), 0) if at in list(Word) else 0 for at in range(256)], "1.0", deaths)


def seen(letter: str = "S", deaths: tuple[Death, ...] = (), **changes: int) -> Health:
    return Health(status_of(deaths, **changes), NOW, letter)


def ago(seconds: float) -> int:
    return NOW - int(seconds * SECOND)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (
            seen("T", PULSE_NS=ago(12)),
            "worker 41 (generation 3) has not answered for 12 s: it is stopped; the watchdog replaces it once requests have waited "
            "for 30 s",
        ),
        (
            seen("T", PULSE_NS=ago(300), WATCHDOG_MS=0),
            "worker 41 (generation 3) has not answered for 5 min: it is stopped; the watchdog is off: 'kill -9 41' has it replaced",
        ),
        (
            seen("R", ANSWERED_NS=ago(21)),
            "worker 41 (generation 3) has not answered for 21 s: it hangs; the watchdog replaces it once requests have waited "
            "for 30 s",
        ),
        (
            seen("S", ANSWERED_NS=ago(8000), TIER_BEGUN=7, TIER_ENDED=6),
            "worker 41 (generation 3) has not answered for 2 h: it waits for the backing; the watchdog leaves it alone",
        ),
        (
            seen("T", PULSE_NS=ago(9), TIER_BEGUN=7, TIER_ENDED=6),
            "worker 41 (generation 3) has not answered for 9 s: it is stopped; the watchdog replaces it once requests have waited "
            "for 30 s",
        ),
        (seen("S"), "worker 41 (generation 3) is late with its answer"),
        (
            seen("R", (DEATH,), IS_SERVING=0, STARTED_NS=ago(0.25)),
            "worker 41 (generation 3) has been starting for 0.25 s; worker 2 (process 39) was ended by SIGSEGV, 3 min ago",
        ),
        (
            seen("", (DEATH,), WORKER_PID=0),
            "a worker is being started (generation 3); worker 2 (process 39) was ended by SIGSEGV, 3 min ago",
        ),
        (
            seen("", (DEATH,), WORKER_PID=0, STATE=State.GAVE_UP),
            "workers died one after the other, and none is started any more: the mount answers errors; "
            "worker 2 (process 39) was ended by SIGSEGV, 3 min ago",
        ),
    ],
)
def test_why_a_mount_does_not_answer_is_said_in_words(found: Health, why: str) -> None:
    assert found.why == why


@pytest.mark.parametrize(
    ("found", "is_silent"),
    [
        (seen(), False),
        (seen("T"), True),
        (seen("R", PULSE_NS=ago(6)), True),
        (seen("R", ANSWERED_NS=ago(11)), True),
        # the last worker's pulse, and nothing of the one that has just been started
        (seen("R", PULSE_NS=ago(40), STARTED_NS=ago(1)), False),
        (seen("R", PULSE_NS=ago(40), IS_SERVING=0), False),
        (seen("", WORKER_PID=0, PULSE_NS=ago(40)), False),
    ],
)
def test_a_worker_is_silent_if_it_is_stopped_or_late(found: Health, is_silent: bool) -> None:
    assert found.is_silent is is_silent
    if is_silent:
        with pytest.raises(NoAnswer, match="the mount does not answer: worker 41"):
            found.refuse_if_silent()
    else:
        found.refuse_if_silent()


def test_the_table_has_the_figures_of_the_last_pulse_and_the_last_deaths() -> None:
    deaths = tuple(Death(ago(100 - at), Cause.KILLED, f"worker {at} (process 3{at}) was ended by SIGKILL") for at in range(4))
    found = seen("T", (*deaths, DEATH), PULSE_NS=ago(12), PAGES_STORED=1024, COMPRESSED_BYTES=1 << 20, POOL_BYTES=2 << 20)
    assert found.rows()[1:] == [
        ("figures", "of 12 s ago"),
        ("swapped out", "4 MiB"),
        ("compressed", "1 MiB (ratio 4.00)"),
        ("pool", "2 MiB"),
        ("backing", "0 B"),
        ("restarts", "5 (4 killed, 1 crashed)"),
        ("", "worker 2 (process 32) was ended by SIGKILL, 98 s ago"),
        ("", "worker 3 (process 33) was ended by SIGKILL, 97 s ago"),
        ("", "worker 2 (process 39) was ended by SIGSEGV, 3 min ago"),
    ]
    assert ("pool", str(2 << 20)) in found.rows(str)
    assert seen("T", PULSE=0).rows()[1] == ("figures", "none yet")


@pytest.fixture
def region(tmp_path: Path) -> Iterator[StatusRegion]:
    found = StatusRegion.create(tmp_path / "a.status")
    yield found
    found.close()


def test_a_reader_finds_what_was_written(region: StatusRegion, tmp_path: Path) -> None:
    region.sign(0, "9.8")
    region.words[Word.WORKER_PID] = 77
    for number in range(20):
        region.add_death(Death(number, Cause(number % 3), f"worker {number}"))
    found = read_status(tmp_path / "a.status")
    assert found is not None
    assert (found.version, found.worker, found.words[Word.DEATHS]) == ("9.8", 77, 20)
    assert list(found.deaths) == region.deaths() == [Death(n, Cause(n % 3), f"worker {n}") for n in range(4, 20)]
    assert [found.words[cause.counter] for cause in Cause] == [7, 7, 6]


def test_a_region_of_another_format_or_none_is_not_read(region: StatusRegion, tmp_path: Path) -> None:
    assert read_status(tmp_path / "b.status") is None
    (tmp_path / "c.status").write_bytes(b"short")
    assert read_status(tmp_path / "c.status") is None
    region.words[Word.FORMAT] += 1
    assert read_status(tmp_path / "a.status") is None


def test_a_cause_that_another_version_has_is_read_as_a_crash(region: StatusRegion, tmp_path: Path) -> None:
    region.add_death(Death(1, Cause.KILLED, "worker 1"))
    region.words[112] = 99
    found = read_status(tmp_path / "a.status")
    assert found is not None and found.deaths[0].cause is Cause.CRASHED


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[subprocess.Popen[bytes], StatusRegion]]:
    """A process that is recorded as the stopped worker of this one, for /mnt/a."""
    monkeypatch.setattr(runtime, "DIRECTORY", tmp_path / "tmemfs.d")
    region = StatusRegion.create(runtime.status_path(Path("/mnt/a")))
    with subprocess.Popen(["sleep", str(HANG_S)]) as process:
        for word, value in SERVING.items():
            region.words[word] = value
        region.words[Word.SUPERVISOR_PID], region.words[Word.WORKER_PID] = os.getpid(), process.pid
        region.words[Word.PULSE_NS] = region.words[Word.STARTED_NS] = region.words[Word.ANSWERED_NS] = time.monotonic_ns()
        yield process, region
        process.kill()
    region.close()


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)


def test_who_waits_is_told_once_and_a_worker_that_answers_is_left_alone(
    child: tuple[subprocess.Popen[bytes], StatusRegion],
) -> None:
    process, said = child[0], list[str]()
    attendant = Attendant(Path("/mnt/a"), False, said.append)
    attendant.attend()
    assert said == []
    stop(process)
    attendant.attend()
    attendant.attend()
    assert len(said) == 1 and said[0].startswith(f"worker {process.pid} (generation 3) has not answered for ")
    assert said[0].endswith("; waiting for it") and process.poll() is None


def test_a_worker_that_does_not_answer_is_killed_where_that_is_wanted(
    child: tuple[subprocess.Popen[bytes], StatusRegion],
) -> None:
    process, said = child[0], list[str]()
    stop(process)
    Attendant(Path("/mnt/a"), True, said.append).attend()
    assert process.wait(HANG_S) == -signal.SIGKILL and said[0].endswith("; it is killed")


def test_a_process_that_is_no_child_of_the_supervisor_is_not_killed(
    child: tuple[subprocess.Popen[bytes], StatusRegion], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, region = child
    stop(process)
    region.words[Word.SUPERVISOR_PID] = 1
    Attendant(Path("/mnt/a"), True, lambda said: None).attend()
    assert process.poll() is None
    assert health.look(Path("/mnt/b")) is None


def test_the_doctor_has_a_line_for_each_record(child: tuple[subprocess.Popen[bytes], StatusRegion]) -> None:
    process, region = child
    started = runtime.process_started(os.getpid())
    assert started is not None
    for place, begun in (("/mnt/a", started), ("/mnt/b", started), ("/mnt/c", started - 1)):
        runtime.write_record(runtime.MountRecord(place, os.getpid(), begun, runtime.boot_id(), 1, "1.0"))
    serving, unknown, dead = checks.daemons()
    assert serving.found.startswith(f"process {process.pid} serves for {os.getpid()} (generation 3); the OOM killer ")
    assert (unknown.ok, dead.ok) == (None, False) and "says nothing" in unknown.found and "has ended" in dead.found
    stop(process)
    assert checks.daemons()[0].ok is None and "it is stopped" in checks.daemons()[0].found
    region.words[Word.STATE] = State.GAVE_UP
    assert checks.daemons()[0].ok is False and "the mount answers errors" in checks.daemons()[0].found


@pytest.mark.parametrize(
    ("causes", "said"),
    [
        ([], []),
        ([(Cause.KILLED, 5)], []),
        ([(Cause.KILLED, 5), (Cause.KILLED, 4)], []),
        ([(Cause.CRASHED, 61)], []),
        ([(Cause.CRASHED, 59)], ["the worker was replaced once in the last minute: worker 0"]),
        ([(Cause.HUNG, 70), (Cause.HUNG, 50), (Cause.KILLED, 3)], ["the worker was replaced 2 times in the last minute: worker 2"]),
        (
            [(Cause.KILLED, 50), (Cause.KILLED, 40), (Cause.KILLED, 3)],
            ["the worker was replaced 3 times in the last minute: worker 2"],
        ),
    ],
)
def test_a_crash_or_many_kills_within_a_minute_degrade_the_state(causes: list[tuple[Cause, int]], said: list[str]) -> None:
    deaths = [Death(ago(seconds), cause, f"worker {at}") for at, (cause, seconds) in enumerate(causes)]
    assert restarts_degrade(deaths, NOW) == said
