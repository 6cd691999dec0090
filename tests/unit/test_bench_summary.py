"""The page of results: what it says of each question, and that it flatters nobody."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools.bench import summary
from tools.bench.accounts import OWN_WEAR
from tools.bench.statistics import Sample
from tools.bench.summary import QUESTIONS, Question, answer, of_run

MACHINE = {
    "commit": "abc",
    "conditions": {"name": "sd", "disk": "sd (20 MB/s written)", "page_cluster": "3", "cpu_dma_latency": "held at 0 for all"},
}
RATE = Question("touching", "work", "rate", "touches/s", more_is_better=True)
TIME = Question("waiting", "work", "s", "s")


def samples(**by_contender: float) -> list[Sample]:
    return [Sample(0, name.replace("_", "-"), "work", {"rate": value, "s": value}) for name, value in by_contender.items()]


def test_an_answer_is_that_of_tmemfs_and_its_ratio_to_the_others() -> None:
    found = samples(plain=50.0, zswap_lzo=200.0, tmemfs=100.0, floor=1.0, tmemfs_pyfuse3=1.0)
    assert answer(RATE, found) == "touching: tmemfs 100 touches/s; 0.50 of zswap-lzo (200), 2.00 of plain (50.0)"


def test_a_ratio_is_rounded_to_the_side_that_does_not_flatter() -> None:
    found = samples(tmemfs=1.999, plain=1.0)
    assert "1.99 of plain" in answer(RATE, found)
    assert "2.00 of plain" in answer(TIME, found)


def test_what_was_not_measured_is_not_said() -> None:
    assert answer(RATE, []) == ""
    assert answer(RATE, samples(plain=5.0)) == "touching: tmemfs has no figure (touches/s); plain (5.00)"
    assert answer(RATE, samples(tmemfs=5.0, plain=0.0)) == "touching: tmemfs 5.00 touches/s; plain (0.00)"


def test_a_run_says_its_conditions_kills_and_limits_that_did_not_hold() -> None:
    found = [Sample(0, "tmemfs", "wear-3", {OWN_WEAR: 1500.0}), Sample(0, "plain", "kills-real-sort", {"oom_kills": 1})]
    checks = [{"part": "overcommit", "contender": "plain", "excess": "write_bps 2 where the limit is 1"}]
    said = of_run(MACHINE, found, checks).splitlines()
    assert said == [
        "**sd (20 MB/s written)**, page-cluster 3, /dev/cpu_dma_latency held at 0 for all; commit abc, 1 round, medians:",
        "",
        "- wear at 3 times the memory: tmemfs 1,500 bytes written per page out",
        "- processes ended by the OOM killer: plain, real-sort: 1",
        "- the disk did more than its limits allow: overcommit plain: write_bps 2 where the limit is 1",
    ]


def test_a_run_of_an_older_bench_is_of_the_fast_disk() -> None:
    assert of_run({"commit": "abc"}, samples(tmemfs=1.0), []).startswith("**fast (no limit)**")


def test_no_question_is_asked_twice() -> None:
    assert len({one.text for one in QUESTIONS}) == len({(one.workload, one.figure) for one in QUESTIONS}) == len(QUESTIONS)


def test_the_page_is_of_all_results_in_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["summary", "--output", str(tmp_path)])
    assert summary.main() == 2
    for name in ("peers.json", "peers-sd.json"):
        machine = MACHINE if "sd" in name else {"commit": "abc"}
        sample = {"round": 0, "contender": "tmemfs", "workload": "wear-3", "figures": {OWN_WEAR: 1500.0}}
        (tmp_path / name).write_text(json.dumps({"machine": machine, "samples": [sample]}))
    assert summary.main() == 0
    page = (tmp_path / "summary.md").read_text()
    assert page.count("wear at 3 times the memory: tmemfs 1,500") == 2 and "**sd (" in page and "**fast (" in page
    assert page.strip() in capsys.readouterr().out
