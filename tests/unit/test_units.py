"""Sizes and durations: every form people write, what is refused, and back to text."""

from __future__ import annotations

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tmemfs.errors import BadValue
from tmemfs.units import format_size, parse_seconds, parse_size

JUNK = [
    "",
    "  ",
    "-1",
    "+1",
    "1e3",
    "0x10",
    "1,5G",
    "1.M",
    ".5M",
    "M",
    "1MM",
    "1 K B",
    "1P",
    "1i",
    "inf",
    "nan",
    "1M 2M",
    "K1",
    "%",
]
#: More than a float can be; eleven of them have more digits than int() takes.
ENDLESS = "9" * 400


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("1", 1), ("4096", 4096), ("4096B", 4096), ("1K", 1 << 10), ("2M", 2 << 20), ("3G", 3 << 30), ("4T", 4 << 40)],
)
def test_a_size_with_a_unit_is_a_power_of_1024(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["64M", "64m", "64MB", "64mb", "64MiB", "64mib", " 64M\n", "64 M", "64 MiB", "65536K", "67108864"])
def test_a_size_may_be_written_in_many_ways(text: str) -> None:
    assert parse_size(text) == 64 << 20


@given(st.integers(0, 1 << 70), st.sampled_from("KMGT"), st.sampled_from(["", "B", "iB", "ib"]))
@example((1 << 53) + 1, "K", "")
def test_a_whole_number_is_exact_whatever_its_size(number: int, unit: str, suffix: str) -> None:
    assert parse_size(f"{number}{unit}{suffix}") == number << 10 * ("KMGT".index(unit) + 1)
    assert parse_size(str(number)) == number


@pytest.mark.parametrize(
    ("text", "expected"), [("0.5K", 512), ("1.5G", 3 << 29), ("0.25T", 1 << 38), ("1.0001K", 1024), ("1.9", 1)]
)
def test_a_fraction_is_cut_to_whole_bytes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max", 4096), ("MAX", 4096), (" Max\n", 4096), ("100%", 4096), ("50%", 2048), ("12.5 %", 512), ("0%", 0), ("200%", 8192)],
)
def test_a_share_is_one_of_the_whole(text: str, expected: int) -> None:
    assert parse_size(text, 4096) == expected


@given(st.integers(0, 1 << 50), st.integers(0, 100))
def test_a_share_is_never_above_the_whole(whole: int, percent: int) -> None:
    assert 0 <= parse_size(f"{percent}%", whole) <= whole


def test_a_size_may_be_given_where_a_share_may() -> None:
    assert parse_size("8K", 4096) == 8192


@pytest.mark.parametrize("text", [*JUNK, "max", "50%", "-50%"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadValue, match="is not a size: give bytes or a number with K, M, G or T, for example 512M"):
        parse_size(text)


@pytest.mark.parametrize("text", [*JUNK, "5%%", "-50%", "maximum"])
def test_what_is_no_share_is_refused_with_what_would_be_one(text: str) -> None:
    with pytest.raises(BadValue, match="K, M, G or T, N% or max, for example 512M"):
        parse_size(text, 4096)


@pytest.mark.parametrize("text", [f"{ENDLESS}.5K", f"{ENDLESS}%", ENDLESS * 11])
def test_a_number_without_end_is_no_size(text: str) -> None:
    with pytest.raises(BadValue):
        parse_size(text, 4096)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0.0),
        ("2", 2.0),
        ("2s", 2.0),
        ("2 s", 2.0),
        ("1.5s", 1.5),
        ("500ms", 0.5),
        ("1m", 60.0),
        ("0.5m", 30.0),
        (" 3s\n", 3.0),
    ],
)
def test_a_duration_is_in_seconds(text: str, expected: float) -> None:
    assert parse_seconds(text) == expected


@pytest.mark.parametrize("text", ["", "s", "-1s", "1h", "1us", "1S", "1e3", "soon", "1s 2s", ".5s", "inf", "nan"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadValue, match="is not a duration: give seconds, for example 2s or 500ms"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (123 << 10, "123 KiB"),
        (3 << 29, "1.5 GiB"),
        (12345678, "11.8 MiB"),
        (1 << 40, "1 TiB"),
        (999 << 40, "999 TiB"),
        (-2048, "-2 KiB"),
        (1536.7, "1.5 KiB"),
    ],
)
def test_a_size_for_people_has_three_digits(size: float, expected: str) -> None:
    assert format_size(size) == expected


@given(st.integers(0, 999 << 40))
@example(999)
@example(1000)
def test_a_size_for_people_can_be_parsed_and_is_right_to_half_a_percent(size: int) -> None:
    text = format_size(size)
    assume("e" not in text)  # the bug below
    assert abs(parse_size(text) - size) <= size * 0.005 + 1


@pytest.mark.parametrize("size", [999 * 1024 + 700, int(999.6 * 2**30), 1000 << 40, 1 << 60])
def test_a_size_for_people_has_no_exponent(size: int) -> None:
    assert "e" not in format_size(size)
