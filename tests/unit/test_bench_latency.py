"""The measurement of wake-ups, its pure parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tmemfs.system import cpu_latency
from tools.bench import latency
from tools.bench.accounts import DiskCounters, Usage, polled_s
from tools.bench.statistics import Sample


@pytest.mark.parametrize(("name", "expected"), [("POLL", 3.5), ("C1", 0.0)])
def test_only_a_state_that_polls_counts_as_polled(tmp_path: Path, name: str, expected: float) -> None:
    for cpu, us in (("cpu0", 1_000_000), ("cpu13", 2_500_000), ("cpuidle", 7)):
        place = tmp_path / cpu / "cpuidle/state0"
        place.mkdir(parents=True)
        (place / "name").write_text(f"{name}\n")
        (place / "time").write_text(f"{us}\n")
    assert polled_s(tmp_path) == expected


def test_a_kernel_without_idle_states_has_polled_for_no_time(tmp_path: Path) -> None:
    assert polled_s(tmp_path) == 0


def test_what_was_polled_between_two_moments_is_the_difference() -> None:
    before = Usage(1.0, 0.0, 0.0, 0.0, 0.0, DiskCounters(), {}, polled_s=5.0)
    assert replace(before, wall_s=2.0, polled_s=5.5).since(before).polled_s == 0.5


def test_the_governors_time_is_restored_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "guest_halt_poll_ns"
    file.write_text("77\n")
    monkeypatch.setattr(cpu_latency, "POLL_NS", file)
    with pytest.raises(ZeroDivisionError), latency.halt_polling(200_000):
        assert file.read_text() == "200000"
        raise ZeroDivisionError
    assert file.read_text() == "77\n"
    with latency.halt_polling(None):
        assert file.read_text() == "77\n"


def test_the_table_has_medians_and_a_dash_for_what_a_workload_does_not_have() -> None:
    samples = [Sample(number, "auto", "ram", {"p50_us": us, "polled": 50.0}) for number, us in enumerate((30.0, 20.0, 25.0))]
    assert latency.table(samples).splitlines()[2] == "| ram | auto | - | 25.0 | - | 50.0 | - | - |"
