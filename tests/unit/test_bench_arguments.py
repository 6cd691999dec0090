"""What the comparison is told on its command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools.bench import peers, peers_plot
from tools.bench.disk import PROFILES, DiskLimits

RESULTS = {"machine": {"commit": "abc"}, "missing": {}, "samples": [], "failures": [], "loads": []}


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["peers", *words])
    monkeypatch.setattr(peers_plot, "plot", lambda *_: None)
    return peers.main()


@pytest.mark.parametrize("words", [("--parts", "nothing"), ("--resumed", "nothing"), ("--disk", "floppy"), ("--page-cluster", "5")])
def test_what_is_not_known_is_refused(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, *words)
    assert error.value.code == 2


@pytest.mark.parametrize(("words", "name"), [((), "peers"), (("--disk", "sd", "--qos"), "peers-sd-qos")])
def test_each_of_the_conditions_has_its_own_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], name: str
) -> None:
    """The results are of a bench that knew no conditions, too."""
    (tmp_path / f"{name}.json").write_text(json.dumps(RESULTS))
    assert run(monkeypatch, "--report", "--output", str(tmp_path), *words) == 0
    assert "commit abc" in (tmp_path / f"{name}.md").read_text()


@pytest.mark.parametrize("name", PROFILES)
def test_only_a_limited_disk_has_its_swap_files_behind_a_loop_device(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["peers", "--disk", name])
    plan, _ = peers._plan(peers._arguments(), tmp_path, DiskLimits(PROFILES[name], "254:0"))
    assert plan.limits(1 << 20).is_disk_limited == (name != "fast")
