"""FUSE on the wire: sizes and offsets as the module documents them, and limits set in a reply that leave the rest of it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from struct import Struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmemfs.fuse import wire
from tmemfs.units import PAGE_BYTES

SIZES = {"u16": 2, "u32": 4, "i32": 4, "u64": 8}
HEADER = "request header"
REQUEST_HEADER_BYTES = 40
U16 = st.integers(0, (1 << 16) - 1)
U32 = st.integers(0, (1 << 32) - 1)


def documented() -> Iterator[tuple[str, int, dict[str, tuple[int, int]]]]:
    """(name, bytes, offset and size by field) of every structure in the module's docstring."""
    assert wire.__doc__
    text = re.sub(r"\n {20,}", " ", wire.__doc__)
    for name, total, fields in re.findall(r"^    (\w[\w ]*), (\d+) bytes(?: \+ data)? +(.*)$", text, re.MULTILINE):
        at, places = 0, {}
        for field in fields.removesuffix(", ...").split(", "):
            label, _, kind = field.rpartition(" ")
            places[label] = (at, SIZES[kind])
            at += SIZES[kind]
        yield name, int(total), places


STRUCTS = {name: places for name, _, places in documented()}
TOTALS = {name: total for name, total, _ in documented()}


def message(name: str, values: dict[str, int]) -> bytearray:
    """A request of kind `name` with these fields behind the header's, by the documented offsets; others are all ones."""
    places = {label: (at + REQUEST_HEADER_BYTES, size) for label, (at, size) in STRUCTS[name].items()} | STRUCTS[HEADER]
    whole = bytearray(b"\xff" * (REQUEST_HEADER_BYTES + TOTALS[name]))
    for label, value in values.items():
        at, size = places[label]
        whole[at : at + size] = value.to_bytes(size, "little")
    return whole


def init_reply(error: int = 0, *, max_write: int = 1 << 20, more: int = 64) -> bytearray:
    """A reply to INIT in which every byte that is not a limit is different from its neighbours."""
    reply = bytearray(range(wire.REPLY_BYTES + more))
    wire.REPLY.pack_into(reply, 0, len(reply), error, 7)
    at, size = STRUCTS["INIT reply"]["max write"]
    reply[wire.REPLY_BYTES + at : wire.REPLY_BYTES + at + size] = max_write.to_bytes(size, "little")
    return reply


def field_of(reply: bytearray, label: str) -> int:
    at, size = STRUCTS["INIT reply"][label]
    return int.from_bytes(reply[wire.REPLY_BYTES + at : wire.REPLY_BYTES + at + size], "little")


def test_every_structure_is_documented() -> None:
    assert list(STRUCTS) == [HEADER, "READ", "WRITE", "FALLOCATE", "reply header", "WRITE reply", "INTERRUPT", "INIT", "INIT reply"]


def test_a_write_and_what_interrupts_it_are_told_by_the_same_number() -> None:
    assert wire.WRITTEN_TO.unpack_from(message("WRITE", {"unique": 12, "fh": 5})) == (12, 5)
    assert wire.INTERRUPTED.unpack_from(message("INTERRUPT", {"unique": 13, "interrupted": 12})) == (12,)


@pytest.mark.parametrize(("name", "total", "places"), [entry for entry in documented() if not entry[0].startswith("INIT")])
def test_the_fields_of_a_structure_add_up_to_its_size(name: str, total: int, places: dict[str, tuple[int, int]]) -> None:
    assert sum(size for _, size in places.values()) == total
    assert all(at % size == 0 for at, size in places.values())


def test_sizes_are_the_documented_ones() -> None:
    assert TOTALS[HEADER] == REQUEST_HEADER_BYTES
    assert REQUEST_HEADER_BYTES + TOTALS["READ"] == REQUEST_HEADER_BYTES + TOTALS["WRITE"] == wire.IO_BYTES == 80
    assert wire.FALLOCATION.size <= REQUEST_HEADER_BYTES + TOTALS["FALLOCATE"] <= wire.IO_BYTES
    assert wire.REPLY_BYTES == wire.REPLY.size == TOTALS["reply header"]
    assert wire.WRITTEN.size == TOTALS["reply header"] + TOTALS["WRITE reply"]


@pytest.mark.parametrize("name", ["READ", "WRITE"])
def test_a_read_and_a_write_are_understood_by_their_first_fields(name: str) -> None:
    request = message(name, {"len": 80, "opcode": 15, "unique": 1 << 40, "nodeid": 2, "offset": 1 << 41, "size": 4096})
    assert len(request) == wire.IO_BYTES
    assert wire.IO.unpack_from(request) == (80, 15, 1 << 40, 2, 1 << 41, 4096)
    assert wire.HEADER.unpack_from(request) == (80, 15, 1 << 40, 2)


def test_a_fallocate_is_understood() -> None:
    values = {"len": 72, "opcode": 43, "unique": 9, "nodeid": 2, "offset": 1 << 41, "length": 1 << 42, "mode": wire.PUNCH_HOLE}
    assert wire.FALLOCATION.unpack_from(message("FALLOCATE", values)) == (72, 43, 9, 2, 1 << 41, 1 << 42, wire.PUNCH_HOLE)


def test_the_opcodes_are_the_kernel_s() -> None:
    assert (wire.READ, wire.WRITE, wire.INIT, wire.INTERRUPT, wire.FALLOCATE) == (15, 16, 26, 36, 43)


@given(st.integers(0, (1 << 64) - 1), st.integers(1, 4095))
def test_an_error_is_negative_and_nothing_more(unique: int, number: int) -> None:
    reply = wire.error_reply(unique, number)
    assert reply == (16).to_bytes(4, "little") + (-number).to_bytes(4, "little", signed=True) + unique.to_bytes(8, "little")


@given(st.integers(0, (1 << 64) - 1), U32)
def test_a_reply_to_a_write_says_how_much_was_written(unique: int, size: int) -> None:
    head = (24).to_bytes(4, "little") + bytes(4) + unique.to_bytes(8, "little")
    assert wire.written_reply(unique, size) == head + size.to_bytes(4, "little") + bytes(4)


def test_an_empty_reply_is_a_header() -> None:
    assert wire.empty_reply(5) == Struct("<IiQ").pack(16, 0, 5)


def test_limits_are_set_in_the_reply_to_init() -> None:
    reply = init_reply()
    wire.limit_requests(reply)
    assert field_of(reply, "max background") == wire.REQUESTS_UNDER_WAY == 8
    assert field_of(reply, "congestion") == 6
    assert field_of(reply, "max write") == wire.REQUEST_BYTES == 64 * PAGE_BYTES
    assert field_of(reply, "max pages") == wire.REQUEST_PAGES == 64


@given(max_write=U32, more=st.integers(64, 200))
def test_limits_change_nothing_but_what_they_limit(max_write: int, more: int) -> None:
    reply = init_reply(max_write=max_write, more=more)
    before = bytes(reply)
    wire.limit_requests(reply)
    places = (STRUCTS["INIT reply"][label] for label in ("max background", "congestion", "max write", "max pages"))
    limited = {wire.REPLY_BYTES + at + byte for at, size in places for byte in range(size)}
    assert len(reply) == len(before)
    assert {at for at in range(len(reply)) if reply[at] != before[at]} <= limited
    assert field_of(reply, "max write") == min(max_write, wire.REQUEST_BYTES)


@pytest.mark.parametrize("more", [0, 64])
def test_an_error_reply_to_init_is_left_as_it_is(more: int) -> None:
    reply = init_reply(-errno.EPROTO, more=more)
    before = bytes(reply)
    wire.limit_requests(reply)
    assert reply == before


def test_a_reply_of_the_protocol_that_libfuse_was_told_is_made_as_long_as_today_s() -> None:
    reply = init_reply(more=24)
    before = bytes(reply)
    wire.limit_requests(reply)
    assert wire.REPLY.unpack_from(reply) == (wire.REPLY_BYTES + 64, 0, 7) and len(reply) == wire.REPLY_BYTES + 64
    assert reply[wire.REPLY_BYTES : wire.REPLY_BYTES + 16] == before[wire.REPLY_BYTES : wire.REPLY_BYTES + 16]
    assert field_of(reply, "max pages") == wire.REQUEST_PAGES and field_of(reply, "max write") == wire.REQUEST_BYTES
    assert field_of(reply, "time granularity") == 0


@pytest.mark.parametrize(("minor", "told"), [(31, 13), (38, 13), (12, 12)])
def test_libfuse_is_told_a_protocol_without_splicing(minor: int, told: int) -> None:
    request = message("INIT", {"opcode": wire.INIT, "major": 7, "minor": minor})
    expected = message("INIT", {"opcode": wire.INIT, "major": 7, "minor": told})
    wire.decline_splice(memoryview(request))
    assert request == expected


@pytest.mark.parametrize("more", [0, 8, 23])
def test_a_reply_too_short_for_limits_is_left_as_it_is(more: int) -> None:
    reply = bytearray(wire.REPLY_BYTES + more)
    wire.limit_requests(reply)
    assert reply == bytes(wire.REPLY_BYTES + more)
