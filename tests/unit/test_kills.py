"""The own logic of tools.kills: stalls, phases, the table, the kernel's log, and the worker of a supervisor."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.waiting import wait_until
from tmemfs.system import runtime
from tools.kills import __main__ as command
from tools.kills.deaths import STOPPED, Strike, Tally, table
from tools.kills.load import Again
from tools.kills.machine_checks import kernel_faults, stuck
from tools.kills.phases import PHASES, Phase
from tools.kills.prober import Answered, Prober, Unanswered, VerifiedWrites, stall_ns
from tools.kills.upgrades import CHANGES, Change
from tools.kills.worker import NoWorker, children_of, end, worker_of
from tools.soak.places import CHECKOUT, Fault

#: A parent that forks another child whenever one has ended, as a supervisor does, and says which in its status region.
SUPERVISOR = """
import os, pathlib, signal, sys
from tmemfs.system.status_region import StatusRegion, Word
status = StatusRegion.create(pathlib.Path(sys.argv[1]))
status.words[Word.SUPERVISOR_PID] = os.getpid()
while True:
    pid = os.fork()
    if not pid:
        signal.pause()
    status.words[Word.WORKER_PID] = pid
    print(pid, flush=True)
    os.waitpid(pid, 0)
"""
LONG_S = 60.0


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    monkeypatch.setattr(runtime, "DIRECTORY", tmp_path)
    command = [sys.executable, "-c", SUPERVISOR, str(tmp_path / "one.status")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as process:
        try:
            yield process
        finally:
            children = children_of(process.pid)
            process.kill()
            for pid in children:
                os.kill(pid, signal.SIGKILL)


def forked(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_the_worker_is_the_one_that_is_named_and_the_next_one_follows_its_death(supervisor: subprocess.Popen[str]) -> None:
    first = forked(supervisor)
    assert worker_of(supervisor.pid, LONG_S) == first
    death = end(supervisor.pid, first, LONG_S)
    assert death is not None and death.pid == first and death.sent_ns < death.ended_ns
    assert worker_of(supervisor.pid, LONG_S, other_than=first) == forked(supervisor)


def test_a_signal_that_does_not_end_the_worker_is_reported(supervisor: subprocess.Popen[str]) -> None:
    worker, called = forked(supervisor), list[int]()
    with pytest.raises(NoWorker, match="did not end within 0 s after SIGSTOP"):
        end(supervisor.pid, worker, 0.01, signal.SIGSTOP, lambda: called.append(worker))
    assert called == [worker]


def test_a_process_that_is_no_worker_is_never_hit(supervisor: subprocess.Popen[str]) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        assert end(supervisor.pid, other.pid, LONG_S) is None
        assert other.poll() is None
        other.kill()
    assert end(supervisor.pid, other.pid, LONG_S) is None


def test_a_supervisor_that_has_gone_has_no_worker() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    with pytest.raises(NoWorker, match="has no worker after 0 s"):
        worker_of(process.pid, 0.01)


def test_the_stall_is_the_longest_wait_from_the_signal_to_the_first_answer_after_the_death() -> None:
    before, pending, next_one, later = Answered(0, 90), Answered(95, 700), Answered(710, 760), Answered(770, 9000)
    assert stall_ns([before, pending, next_one, later], sent_ns=100, ended_ns=150) == 600
    # sent before the death was complete, and the answer was the old worker's
    assert stall_ns([Answered(120, 140), Answered(160, 500)], sent_ns=100, ended_ns=150) == 340


def test_there_is_no_stall_to_tell_before_a_request_sent_after_the_death_is_answered() -> None:
    assert stall_ns([Answered(0, 90), Answered(95, 700)], sent_ns=100, ended_ns=150) is None
    assert stall_ns([], 0, 0) is None


def test_a_prober_reports_a_request_that_failed() -> None:
    def fail() -> None:
        raise OSError(5, "Input/output error")

    with Prober("swap", fail) as prober, pytest.raises(Unanswered, match=r"swap: a page request failed .* Input/output error"):
        prober.wait_for_stall(0, 0, LONG_S)


def test_a_prober_notes_how_long_requests_take_that_wait() -> None:
    may_go, waits = threading.Event(), threading.Event()

    def wait() -> None:
        waits.set()
        may_go.wait()

    with Prober("swap", wait) as prober:
        waits.wait()
        with pytest.raises(Unanswered, match="no page request was answered within 0 s after a death"):
            prober.wait_for_stall(0, 0, 0.01)
        may_go.set()
        assert prober.wait_for_stall(0, 0, LONG_S) >= 10_000_000
        assert prober.is_answered_since(0) and not prober.is_answered_since(1 << 62)


def test_wrong_bytes_in_an_answer_are_found(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(16 * 4096))
    pages = VerifiedWrites(image, range(8, 16), seed=1)
    for _ in range(100):
        pages.request()
    pages.verify_all()
    assert pages.verified > 20 and image.read_bytes()[: 8 * 4096] == bytes(8 * 4096)
    image.write_bytes(bytes(16 * 4096))
    with pytest.raises(Unanswered, match="has not the bytes that were stored"):
        pages.verify_all()
    pages.close()
    pages.close()


def test_a_phase_is_seen_by_a_counter_that_grows() -> None:
    phase = Phase("writing back", moves=("pages_written", "cleanings"))
    assert phase.is_seen({"pages_written": "1"}, {"pages_written": "2"})
    assert phase.is_seen({}, {"cleanings": "1"})
    assert not phase.is_seen({"pages_written": "2", "stores": "1"}, {"pages_written": "2", "stores": "9"})


def test_the_counters_of_all_phases_are_those_of_stat() -> None:
    document = (Path(__file__).parents[2] / "docs/control.md").read_text()
    for phase in PHASES:
        assert all(f"| `{key}` | counter |" in document for key in phase.moves), phase
        assert all(f"| `{name}` | 0644 |" in document for name, _ in phase.begin), phase


def test_the_table_has_a_row_per_phase_and_one_of_all() -> None:
    strikes = [
        Strike("any moment", 1, False, 0.010, 0.002),
        Strike("recovering", 2, True, 0.500, 0.004),
        Strike("any moment", 1, False, 0.030, 0.003),
    ]
    rows = [line.split() for line in table(strikes)]
    assert rows[1:] == [
        ["any", "moment", "2", "2", "0", "2.0", "10.0", "30.0", "30.0"],
        ["recovering", "1", "2", "1", "4.0", "500.0", "500.0", "500.0"],
        ["all", "3", "4", "1", "3.0", "30.0", "500.0", "500.0"],
    ]
    assert len(table([])) == 1


def test_a_run_says_whether_it_passed() -> None:
    tally = Tally(7, [Strike("any moment", 1, False, 0.01)], Counter({"fio runs": 2}), seconds=3.2)
    assert tally.lines()[0] == "1 deaths of a worker in 3 s, seed 7: passed"
    assert "verified: fio runs 2" in tally.lines() and "control requests: none" in tally.lines()
    tally.faults.append("a byte was wrong")
    assert "FAILED" in tally.lines()[0] and tally.lines()[-1] == "FAULT: a byte was wrong"


def test_the_supervisors_have_to_count_what_was_killed() -> None:
    tally = Tally(7, [Strike("any moment", 1, False, 0.01), Strike("recovering", 2, True, 0.01), Strike(STOPPED, 1, True, 2.5)])
    tally.supervisors.update({"worker_killed": 3, "worker_hung": 1})
    assert tally.miscounted() == []
    tally.supervisors.update({"worker_killed": 1, "worker_crashed": 1})
    assert tally.miscounted() == ["worker_crashed is 1", "worker_killed is 4 after 3 such deaths"]
    tally.strikes.append(Strike("upgraded", 0, True, 0.1))
    assert tally.miscounted() == ["worker_crashed is 1"]


def test_only_errors_of_our_own_devices_count() -> None:
    lines = [
        "I/O error, dev loop3, sector 64 op 0x0:(READ) flags 0x0 phys_seg 1 prio class 2",
        "I/O error, dev loop30, sector 64 op 0x0:(READ) flags 0x0 phys_seg 1 prio class 2",
        "Read-error on swap-device (7:3:1234)",
        "Read-error on swap-device (7:30:1234)",
        "EXT4-fs error (device loop3): ext4_find_entry:1455: inode #2: comm ls: reading directory lblock 0",
        "EXT4-fs (loop3): mounted filesystem",
        "INFO: task fio:123 blocked for more than 30 seconds.",
    ]
    assert kernel_faults(lines, ("loop3", "7:3")) == [lines[0], lines[2], lines[4], lines[6]]
    assert kernel_faults(lines, ()) == [lines[6]]


def test_nothing_is_stuck_on_a_machine_that_works() -> None:
    assert not [line for line in stuck() if "python" in line]


def test_a_program_that_ends_badly_is_a_fault(tmp_path: Path) -> None:
    counts = Counter[str]()
    with (tmp_path / "log").open("w+b") as log:
        good = Again("good", ["echo", "12"], tmp_path, log, lambda said, counts: counts.update({"sum": int(said)}), counts)
        good.start()

        def is_again() -> bool:
            good.check()
            return counts["good runs"] >= 2

        wait_until(is_again)
        good.stop()
        assert counts["sum"] == 12 * counts["good runs"]
        bad = Again("bad", ["sh", "-c", "echo wrong byte; exit 3"], tmp_path, log, lambda said, counts: None, counts)
        bad.start()
        with pytest.raises(Fault, match="bad ended with 3: wrong byte"):
            bad.stop()


def test_the_command_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "missing_programs", lambda: ["fio"])
    assert command.main(["--kills", "1"]) == 2
    assert "not installed: fio" in capsys.readouterr().err


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_a_version_that_cannot_take_over_is_this_one_with_a_line_changed(change: Change) -> None:
    text = (CHECKOUT / "tmemfs" / change.file).read_text()
    changed, count = re.subn(change.pattern, change.replacement, text, flags=re.M)
    assert count == 1 and changed != text
    compile(changed, change.file, "exec")


def test_a_seed_fixes_the_phases() -> None:
    def chosen(seed: int) -> list[Phase]:
        random = Random(seed)
        return [random.choice(PHASES) for _ in range(50)]

    assert chosen(1) == chosen(1) != chosen(2)
