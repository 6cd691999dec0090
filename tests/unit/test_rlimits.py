"""A daemon gets the resource limits it needs, or is refused before it mounts. The limits of this process are left alone."""

from __future__ import annotations

import resource

import pytest

from tmemfs.errors import Refused
from tmemfs.system import rlimits

INFINITE = resource.RLIM_INFINITY
Limits = dict[int, tuple[int, int]]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Limits:
    """(soft, hard) of each limit; a hard one cannot be raised."""
    now: Limits = dict.fromkeys((limit.number for limit in rlimits._LIMITS), (INFINITE, INFINITE))

    def set_limit(number: int, value: tuple[int, int]) -> None:
        if value[1] != now[number][1]:
            raise ValueError("not allowed to raise maximum limit")
        now[number] = value

    monkeypatch.setattr(resource, "getrlimit", now.__getitem__)
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    return now


def test_soft_limits_are_raised_to_what_is_needed(given: Limits) -> None:
    given[resource.RLIMIT_NOFILE] = (18, 4096)
    given[resource.RLIMIT_FSIZE] = (1 << 20, INFINITE)
    given[resource.RLIMIT_CPU] = (1, INFINITE)
    rlimits.raise_limits()
    assert given[resource.RLIMIT_NOFILE] == (256, 4096)
    assert given[resource.RLIMIT_FSIZE] == given[resource.RLIMIT_CPU] == (INFINITE, INFINITE)


def test_limits_that_are_high_enough_are_left_alone(given: Limits) -> None:
    given[resource.RLIMIT_NOFILE] = (1024, 1024)
    before = dict(given)
    rlimits.raise_limits()
    assert given == before


@pytest.mark.parametrize(
    ("number", "value", "says"),
    [
        (resource.RLIMIT_NOFILE, 18, "the limit on open files is 18 here, and a daemon needs 256: run 'ulimit -n 256' as root"),
        (resource.RLIMIT_FSIZE, 1 << 20, "the limit on the size of a file is 1048576 here, and a daemon needs unlimited"),
        (resource.RLIMIT_AS, 1 << 30, "address space .* run 'ulimit -v unlimited'"),
        (resource.RLIMIT_DATA, 1 << 30, "data .* run 'ulimit -d unlimited'"),
        (resource.RLIMIT_CPU, 60, "CPU time .* run 'ulimit -t unlimited'"),
        (resource.RLIMIT_RTTIME, 60, "real-time CPU time .* run 'ulimit -R unlimited'"),
    ],
)
def test_a_hard_limit_that_is_too_low_is_refused_by_name(given: Limits, number: int, value: int, says: str) -> None:
    given[number] = (value, value)
    with pytest.raises(Refused, match=says):
        rlimits.raise_limits()
