"""The registry of metrics: documented, shown where it says, valid for Prometheus, and read without a scan."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from tests.exposition import families
from tests.parts import FaultyTier, Regions, new_limits, new_pressure, page_of
from tmemfs.engine import Engine
from tmemfs.jobs.supervision import Jobs
from tmemfs.observe import report
from tmemfs.observe.metric import Metric, Output
from tmemfs.observe.prometheus import exposition, name_of
from tmemfs.observe.registry import SECTIONS, shown_in, units
from tmemfs.services import Services
from tmemfs.store.codec import encode, parse_codec
from tmemfs.store.segments import SegmentTable
from tmemfs.store.slots import SlotTable
from tmemfs.system import memory
from tmemfs.units import MIB
from tools.control_document import document

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "control.md"
ALL: Final = tuple(metric for section in SECTIONS for metric in section.metrics)
KEYED: Final[tuple[Output, ...]] = ("stat", "events", "mm_stat", "io_stat", "bd_stat")


@pytest.fixture
def services() -> Iterator[Services]:
    regions = Regions.new(slots=1024, frames=16, extents=16)
    engine = Engine.over(partial(regions.start, limit=12, slots=1024), FaultyTier(), parse_codec("lz4"))
    engine.tmem.store(0, [encode(page_of("raw", number), parse_codec("lz4")) for number in range(300)])
    outcomes = {"memory_locked": 1, "io_flusher": 0}
    yield Services(engine, new_limits(engine, 64 * MIB, 16 * MIB), new_pressure(engine), Jobs(), outcomes)
    regions.close()


def test_the_document_is_made_from_the_registry() -> None:
    assert DOCUMENT.exists(), "docs/control.md is not there: run make docs"
    assert DOCUMENT.read_text() == document(), "docs/control.md is not of this registry: run make docs"


@pytest.mark.parametrize("output", KEYED)
def test_every_key_is_documented_with_kind_unit_and_meaning(output: Output) -> None:
    rows = [line.strip("| ").split(" | ") for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    documented = {row[0].strip("`"): row[1:] for row in rows}
    for metric in shown_in(output):
        assert documented.get(metric.name) == [metric.kind, metric.unit, metric.help], metric.name


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name)
def test_a_metric_says_what_it_is(metric: Metric) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
    assert metric.help.endswith(".") and "|" not in metric.help and "\n" not in metric.help
    assert metric.outputs
    assert (metric.unit == "-") == (metric.kind == "info")
    suffix = metric.name.rpartition("_")[2]
    assert {"ms": "ms", "us": "us", "kbytes": "kB"}.get(suffix, metric.unit) == metric.unit
    assert suffix not in ("bytes", "pages", "segments") or suffix == metric.unit


def test_names_are_unique_and_an_event_is_no_key_of_stat() -> None:
    names = [metric.name for metric in ALL]
    assert len(set(names)) == len(names)


def test_what_stat_and_events_count_is_a_metric_of_prometheus() -> None:
    shown = {metric.name for metric in shown_in("metrics")}
    keyed: tuple[Output, ...] = ("stat", "events")
    numbers = {metric.name for output in keyed for metric in shown_in(output) if metric.kind != "info"}
    assert numbers <= shown
    assert shown - numbers == {"version", "codec", "healthy"}


def test_every_protection_that_is_tried_is_shown() -> None:
    tried = set(re.findall(r'utcome\("(\w+)"', Path(memory.__file__).read_text()))
    assert tried and tried <= units().keys()


@pytest.mark.parametrize("output", [*KEYED, "metrics"])
def test_no_metric_scans_slots_or_segments(services: Services, monkeypatch: pytest.MonkeyPatch, output: Output) -> None:
    def scan(*_: object) -> None:
        raise AssertionError("a metric scans")

    for table, names in ((SlotTable, ("occupied",)), (SegmentTable, ("in_use", "dictionaries", "lane", "state", "fill"))):
        for name in names:
            monkeypatch.setattr(table, name, scan)
    assert report.figures(services, output)


def test_a_value_that_does_not_apply_is_a_dash_and_no_limit_is_max(services: Services) -> None:
    stat = dict(line.split(" ") for line in report.flat_keyed(services, "stat").splitlines())
    assert (stat["min_free_kbytes"], stat["requests"], stat["realtime"]) == ("-", "-", "-")
    assert (stat["pressure_ceiling"], stat["cleaner_budget_left"]) == ("max", "max")
    assert (stat["memory_locked"], stat["io_flusher"]) == ("1", "0")


# ---- Prometheus ----------------------------------------------------------------------------------------------------


def test_metrics_are_valid_for_prometheus(services: Services) -> None:
    text = report.prometheus(services)
    found = families(text)
    assert found["tmemfs_stores_total"] == ("counter", "300")
    assert found["tmemfs_healthy"] == ("gauge", "1")
    assert found["tmemfs_cleaner_budget_left"] == ("gauge", "+Inf")
    assert 'tmemfs_info{version="' in text and '",codec="lz4"} 1' in text
    assert "tmemfs_min_free_bytes" not in found and "tmemfs_requests_total" not in found  # they do not apply


def test_every_metric_would_be_valid_for_prometheus() -> None:
    numbers = [metric for metric in shown_in("metrics") if metric.kind != "info"]
    assert len(families(exposition((metric, 1.5) for metric in numbers))) == len(numbers)
    assert not exposition([]).strip()


def test_units_become_base_units() -> None:
    metrics = {metric.name: metric for metric in ALL}
    names = {
        "cleaner_paused_ms": ("tmemfs_cleaner_paused_seconds_total", 1500, "1.5"),
        "pressure_first_release_us": ("tmemfs_pressure_first_release_seconds", 1, "1e-06"),
        "min_free_kbytes_administrators": ("tmemfs_min_free_bytes_administrators", 67584, "69206016"),
        "pool_max": ("tmemfs_pool_max", 1 << 40, "1099511627776"),
    }
    for key, (name, value, text) in names.items():
        assert name_of(metrics[key]) == name
        assert families(exposition([(metrics[key], value)]))[name][1] == text


def test_texts_are_escaped() -> None:
    metric = Metric("path", "info", "-", "A path.", lambda s: "")
    assert exposition([(metric, 'a"b\\c\nd')]).splitlines()[2] == r'tmemfs_info{path="a\"b\\c\nd"} 1'
    families(exposition([(metric, 'a"b\\c\nd')]))
    number = Metric("figure", "gauge", "1", "One\\two\nthree.", lambda s: 0)
    assert exposition([(number, 0)]).splitlines()[0] == r"# HELP tmemfs_figure One\\two\nthree."
