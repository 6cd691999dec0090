"""What a comparison sets for all contenders alike, and how that is named."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tmemfs.errors import Refused
from tools.bench import conditions
from tools.bench.conditions import Conditions, add_options
from tools.bench.disk import PROFILES


def parsed(*words: str) -> Conditions:
    """The conditions of a command line."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    return Conditions.of(parser.parse_args(words))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the place of vm.page-cluster."""
    file = tmp_path / "page-cluster"
    file.write_text("3\n")
    monkeypatch.setattr(conditions, "PAGE_CLUSTER", file)
    return file


@pytest.fixture
def latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the place of the device of PM QoS."""
    file = tmp_path / "cpu_dma_latency"
    file.touch()
    monkeypatch.setattr(conditions, "_LATENCY", file)
    return file


def test_without_options_the_machine_is_as_it_is(cluster: Path, latency: Path, tmp_path: Path) -> None:
    assert parsed() == Conditions()
    with parsed().applied(tmp_path, tmp_path / "record"):
        assert (cluster.read_text(), latency.read_bytes()) == ("3", b"")


def test_options_name_the_results() -> None:
    assert parsed().name == "fast"
    assert parsed("--disk", "sd").name == "sd"
    assert parsed("--disk", "cloud", "--page-cluster", "0", "--qos").name == "cloud-cluster0-qos"


def test_page_cluster_and_latency_hold_for_the_block(cluster: Path, latency: Path, tmp_path: Path) -> None:
    with parsed("--page-cluster", "0", "--qos").applied(tmp_path, tmp_path / "record") as disk:
        assert (cluster.read_text(), latency.read_bytes()) == ("0", bytes(4))
        assert disk.profile == PROFILES["fast"]
        assert parsed("--qos").record["page_cluster"] == "0"
    assert cluster.read_text().strip() == "3"


def test_what_a_workload_sets_is_restored_too(cluster: Path, tmp_path: Path) -> None:
    """It restores by itself, unless it is killed."""
    with parsed().applied(tmp_path, tmp_path / "record"):
        cluster.write_text("0")
    assert cluster.read_text().strip() == "3"


def test_without_pm_qos_it_is_refused_and_nothing_changed(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "_LATENCY", tmp_path / "none")
    with (
        pytest.raises(Refused, match="leave out --qos"),
        parsed("--qos", "--page-cluster", "0").applied(tmp_path, tmp_path / "record"),
    ):
        pass
    assert cluster.read_text() == "3\n" and not (tmp_path / "record").exists()
