"""The virtual machine's pure parts: what kernel logs and samples say, which guests it takes, how one is booted, the verdicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.vm import __main__ as vm
from tools.vm import evidence, machine
from tools.vm.contenders import unprotected
from tools.vm.evidence import Killed, Sample, Verdict
from tools.vm.growth import MARGIN_BYTES, lockable_bytes
from tools.vm.hogs import PAGE, Pages, memory_of, wrong_pages
from tools.vm.scenarios import SCENARIOS
from tools.vm.watch import completed_requests

KILLED = """\
[  101.123456] python invoked oom-killer: gfp_mask=0x140dca(GFP_HIGHUSER_MOVABLE|__GFP_COMP|__GFP_ZERO), order=0, oom_score_adj=0
[  101.200000] oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,global_oom,task=python,pid=313,uid=0
[  101.200001] Out of memory: Killed process 313 (python) total-vm:393216kB, anon-rss:1kB, file-rss:4kB, shmem-rss:0kB, UID:0
[  109.000001] Out of memory: Killed process 254 (tmemfs) total-vm:393216kB, anon-rss:1kB, file-rss:4kB, shmem-rss:0kB, UID:0
"""
HUNG = """\
[  243.105123] INFO: task jbd2/vda-8:251 blocked for more than 30 seconds.
[  243.105124]       Not tainted 6.1.0-56-amd64 #1 Debian 6.1.192-2
[  243.105125] INFO: task stress-ng-vm:400 blocked for more than 60 seconds.
"""
QUIET_LOG = "[    0.000000] Linux version 6.1.0\n[   12.000000] EXT4-fs (vda): mounted filesystem\n"
ZONEINFO = (
    "Node 0, zone DMA\n  pages free     443\n        min      22\n        low      27\nNode 0, zone DMA32\n        min      1159\n"
)


def samples(*pairs: tuple[float, float]) -> list[Sample]:
    return [Sample(at, value) for at, value in pairs]


def test_the_killed_are_found_in_the_log() -> None:
    assert evidence.oom_kills(KILLED) == [Killed(313, "python"), Killed(254, "tmemfs")]
    assert evidence.was_out_of_memory(KILLED) and not evidence.was_out_of_memory(QUIET_LOG)
    assert evidence.oom_kills(QUIET_LOG) == []


def test_hung_tasks_are_found_in_the_log() -> None:
    assert evidence.hung_tasks(HUNG) == ["jbd2/vda-8:251 for 30 s", "stress-ng-vm:400 for 60 s"]
    assert evidence.hung_tasks(KILLED) == []


def test_a_quiet_log_gives_no_reason() -> None:
    assert evidence.judge_log(QUIET_LOG) == []
    assert evidence.judge_log(QUIET_LOG, 254, kills_allowed=True) == []


def test_every_kill_counts_unless_only_the_daemon_matters() -> None:
    assert len(evidence.judge_log(KILLED)) == 2
    assert evidence.judge_log(KILLED, 254, kills_allowed=True) == ["the OOM killer ended tmemfs (254)"]
    assert evidence.judge_log(KILLED, 999, kills_allowed=True) == []


def test_hung_tasks_and_errors_of_the_swap_always_count() -> None:
    reasons = evidence.judge_log(HUNG + "[ 250.0] Read-error on swap-device (7:0:1234)\n", 254, kills_allowed=True)
    assert len(reasons) == 3 and "Read-error on swap-device (7:0:1234)" in reasons[2]


def test_the_longest_gap_runs_from_one_move_to_the_next() -> None:
    moving = samples((0, 0), (1, 5), (2, 5), (3, 5), (4.5, 6), (5, 7))
    assert evidence.longest_gap(moving) == 3.5
    assert evidence.longest_gap([]) == 0 and evidence.longest_gap(samples((3, 1))) == 0


def test_a_counter_that_never_moves_is_one_gap() -> None:
    assert evidence.longest_gap(samples((0, 4), (10, 4), (30, 4))) == 30


def test_a_gap_at_the_end_counts() -> None:
    assert evidence.longest_gap(samples((0, 0), (1, 1), (9, 1))) == 8


def test_intervals_without_progress_are_whole_ones() -> None:
    stuck = samples((100, 0), (105, 1), (111, 1), (119, 1), (121, 2), (131, 2), (135, 2))
    assert evidence.intervals_without_progress(stuck, 10) == [10]
    assert evidence.intervals_without_progress([], 10) == []


def test_rates_of_a_pool_that_falls() -> None:
    pool = samples((0, 50), (1, 100), (2, 90), (3, 40), (4, 30), (5, 35))
    assert evidence.fastest_fall(pool) == 50
    assert evidence.steady_fall(pool) == pytest.approx(70 / 3)
    assert evidence.steady_fall(samples((0, 1), (1, 2))) == 0 and evidence.steady_fall([]) == 0
    assert evidence.first_fall(pool, step=20) == 3 and evidence.first_fall(pool, step=80) is None


def test_first_growth_is_seen_from_the_first_sample() -> None:
    assert evidence.first_growth(samples((0, 7), (1, 7), (2, 8))) == 2
    assert evidence.first_growth(samples((0, 7))) is None and evidence.first_growth([]) is None


def test_the_kernels_tables_are_read() -> None:
    assert evidence.minimum_watermark_pages(ZONEINFO) == 1181
    assert evidence.meminfo("MemTotal:   461524 kB\nHugePages_Total:       0\n") == {"MemTotal": 461524 << 10}
    assert evidence.numbers("pswpin 12\nzone relaxed\nceiling max\n") == {"pswpin": 12}
    assert evidence.flat("state degraded: why\nshort\n") == {"state": "degraded: why"}


def test_completed_requests_are_reads_and_writes(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(
        "     120        0     960        4     3000        0    24000       90        0       80       95\n"
    )
    assert completed_requests(tmp_path / "stat") == 3120


def test_the_growth_is_four_fifths_of_ram_where_there_is_so_much() -> None:
    assert lockable_bytes(1000 << 20, 900 << 20) == 800 << 20
    assert lockable_bytes(1000 << 20, 700 << 20) == (700 << 20) - MARGIN_BYTES


def test_a_page_is_made_again_and_a_wrong_byte_is_found() -> None:
    supply, memory = Pages(3), memory_of(4)
    for number in range(4):
        memory[number * PAGE : (number + 1) * PAGE] = supply.page(number)
    assert wrong_pages(memory, 4, supply) == 0 and wrong_pages(memory, 4, Pages(4)) == 4
    memory[2 * PAGE + 4095] = 1
    assert wrong_pages(memory, 4, supply) == 1
    assert len({supply.page(number, version) for number in range(9) for version in range(9)}) == 81


def test_the_newest_kernel_is_the_one_of_the_highest_version(tmp_path: Path) -> None:
    with pytest.raises(machine.NotHere, match="apt-get install linux-image-amd64"):
        machine.newest_kernel(tmp_path)
    for name in ("vmlinuz-6.1.0-9-amd64", "vmlinuz-6.1.0-56-amd64", "vmlinuz-5.10.0-99-amd64", "initrd.img-6.12.0-1-amd64"):
        (tmp_path / name).touch()
    assert machine.newest_kernel(tmp_path).name == "vmlinuz-6.1.0-56-amd64"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    empty = {"PATH": str(tmp_path)}
    assert "qemu-system-x86" in machine.missing_programs(empty)
    with pytest.raises(machine.NotHere, match=r"virtme-ng.*make test-vm"):
        machine.require(empty)


def test_the_command_line_of_a_guest(tmp_path: Path) -> None:
    boot = machine.Boot(Path("/boot/vmlinuz-9"), tmp_path / "disk", tmp_path / "results", tmp_path / "results" / "program")
    words = machine.command_line(boot)
    assert words[:3] == ["vng", "--run", "/boot/vmlinuz-9"]
    assert words[words.index("--memory") + 1] == "512M" and words[words.index("--disk") + 1] == str(boot.disk)
    assert f"--rwdir={boot.results}" in words and "--rw" not in words
    assert words[-2:] == ["--exec", str(boot.program)]


def test_the_program_of_a_guest_runs_from_the_copied_tree() -> None:
    text = machine.program_text("/v/bin/python", Path("/a b/tree"), "zram", Path("/r"), ("quiet", "low-memory"), True)
    assert "cd '/a b/tree' && exec /v/bin/python -m tools.vm.guest" in text
    assert text.endswith("--contender zram --results /r --full quiet low-memory\n")


def test_programs_start_without_the_observers_protection() -> None:
    assert unprotected(["true", "a b"])[-2:] == ["true", "a b"]
    assert "echo 0 > /proc/self/oom_score_adj" in unprotected(["true"])[2]


def test_the_plan_compares_only_what_is_compared() -> None:
    runs = [(run.contender, run.scenarios) for run in vm.plan(None, None)]
    assert runs == [
        ("tmemfs", ("privileges", "quiet", "low-memory", "kills")),
        ("tmemfs", ("mlock-growth",)),
        ("tmemfs", ("nothing-but-swap",)),
        ("zram", ("mlock-growth",)),
        ("zswap", ("mlock-growth",)),
    ]
    assert [run.name for run in vm.plan(["quiet"], ["tmemfs", "zram"])] == ["tmemfs-quiet"]
    assert [run.name for run in vm.plan(["low-memory"], ["zswap"])] == ["zswap-low-memory"]
    assert [run.name for run in vm.plan(["low-memory"], None)] == ["tmemfs-low-memory"]
    assert set(SCENARIOS) == set(vm.LIMITS_S)


def test_only_verdicts_on_tmemfs_decide() -> None:
    bad, good = Verdict("quiet", "zram", {}, ("killed",)), Verdict("quiet", "tmemfs")
    assert good.passed and not bad.passed
    assert vm.exit_code([good, bad]) == 0
    assert vm.exit_code([good, Verdict("mlock-growth", "tmemfs", {}, ("hung",))]) == 1
    assert "FAILED\n        killed" in vm.report([good, bad])


def test_a_guest_without_a_verdict_has_failed(tmp_path: Path) -> None:
    verdict = vm.read_verdict("tmemfs", "quiet", tmp_path, "the guest hung")
    assert not verdict.passed and "the guest hung" in verdict.reasons[0]


ASKED = """\
[   19.6] Node 0 DMA32 free:3772kB boost:2048kB min:4636kB low:5280kB high:5924kB
[   20.0] sysrq: Show Blocked State
[   20.1] task:kworker/u4:1    state:D stack:0     pid:28    ppid:2      flags:0x00004000
[   20.1]  <TASK>
[   20.1]  __schedule+0x34d/0xa00
[   20.1]  schedule_timeout+0x94/0x150
[   20.1]  ? __bpf_trace_tick_stop+0x10/0x10
[   20.1]  mempool_alloc+0x172/0x1b0
[   20.1]  bio_alloc_bioset+0x1e2/0x490
[   20.2] task:kworker/u4:1    state:D stack:0     pid:29    ppid:2      flags:0x00004000
[   20.2]  mempool_alloc+0x172/0x1b0
[   20.2]  bio_alloc_bioset+0x1e2/0x490
[   21.0] sysrq: Show State
[   21.1] task:idle            state:S stack:0     pid:1     ppid:0      flags:0x00000002
[   21.1]  ep_poll+0x34d/0xa00
"""


def test_a_hung_guest_says_where(tmp_path: Path) -> None:
    (tmp_path / "console.log").write_text(ASKED)
    where = ("zone DMA32: free 3772kB, minimum 4636kB with a boost of 2048kB", "kworker/u4:1: mempool_alloc < bio_alloc_bioset")
    assert vm.read_verdict("tmemfs", "quiet", tmp_path, "the guest hung").reasons[1:] == where
    assert evidence.where_it_hangs("nothing was told") == []


def test_a_guest_that_had_to_be_ended_has_failed_whatever_it_wrote(tmp_path: Path) -> None:
    (tmp_path / "quiet.json").write_text(json.dumps({"figures": {"wakes_per_s_least": 0.2}, "reasons": []}))
    assert vm.read_verdict("tmemfs", "quiet", tmp_path, None).passed
    ended = vm.read_verdict("tmemfs", "quiet", tmp_path, "the guest did not end in time")
    assert not ended.passed and ended.figures == {"wakes_per_s_least": 0.2}
