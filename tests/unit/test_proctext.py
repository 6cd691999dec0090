"""Texts of the kernel: whatever bytes a name has, it comes out as it is, and tears no line apart."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmemfs.system import proctext
from tmemfs.system.proctext import SwapEntry

#: What str.split or str.splitlines take for a separator, and what is no UTF-8.
HARD = [
    b"/m/\xff\xfe",
    "/m/a\u2028b".encode(),
    "/m/a\u00a0b".encode(),
    b"/m/a\x0cb",
    b"/m/a\x1cb\x85c",
    b"/m/a\rb",
    b"/m/ \t\n\\ b",
]

names = st.binary(min_size=1, max_size=60).map(lambda name: b"/" + name.replace(b"\0", b"/"))


def mangled(name: bytes, escaped: bytes = b" \t\n\\") -> bytes:
    """As the kernel writes a name in its tables (fs/seq_file.c)."""
    return b"".join(b"\\%03o" % byte if byte in escaped else bytes([byte]) for byte in name)


@pytest.fixture(params=HARD, ids=ascii)
def hard(request: pytest.FixtureRequest) -> bytes:
    name: bytes = request.param
    return name


@given(names, names, st.booleans())
def test_a_mount_of_any_name_is_found(mountpoint: bytes, root: bytes, is_shared: bool) -> None:
    line = b"36 35 0:52 %s %s rw,noatime %s- fuse.tmemfs tmemfs rw,user_id=0" % (
        mangled(root, b" \t\n\\#"),
        mangled(mountpoint, b" \t\n\\#"),
        b"shared:1 master:2 " if is_shared else b"",
    )
    text = b"22 27 0:21 / /proc rw - proc proc rw\n" + line + b"\n37 27 8:1 / / rw - ext4 /dev/sda1 rw\n"
    first, found, last = proctext.parse_mounts(text)
    assert (first.mountpoint, last.mountpoint) == ("/proc", "/")
    assert os.fsencode(found.mountpoint) == mountpoint and os.fsencode(found.root) == root
    assert (found.device, found.kind, found.super_options) == (52, "fuse.tmemfs", ("rw", "user_id=0"))


@given(names)
def test_a_swap_of_any_name_is_found(name: bytes) -> None:
    head = b"Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    shown = mangled(name)
    text = head + shown.ljust(max(40, len(shown) + 1)) + b"file\t\t1048572\t\t2048\t\t-2\n"
    text += b"/dev/loop3                              partition\t1024\t0\t100\n"
    assert proctext.parse_swaps(text) == [
        SwapEntry(os.fsdecode(name), 1048572 << 10, 2048 << 10, -2),
        SwapEntry("/dev/loop3", 1 << 20, 0, 100),
    ]


@given(names)
def test_a_loop_device_over_a_file_of_any_name_is_found(name: bytes) -> None:
    if not name.endswith(b" (deleted)"):
        assert os.fsencode(proctext.parse_backing_file(name + b"\n")) == name
        assert os.fsencode(proctext.parse_backing_file(name + b" (deleted)\n")) == name


@given(names)
def test_a_cgroup_of_any_name_is_found(name: bytes) -> None:
    name = name.replace(b"\n", b"")  # no cgroup has a newline in its name
    text = b"3:cpu,memory:%s\n0::%s\n" % (name, name)
    assert proctext.parse_cgroups(text) == [(["cpu", "memory"], os.fsdecode(name)), ([], os.fsdecode(name))]


@given(st.binary(max_size=15).map(lambda name: name.replace(b"\0", b")")))
def test_a_process_of_any_name_has_its_state_and_beginning(name: bytes) -> None:
    text = b"12 (%s) S 1 12 12 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 1000 200 18446744073709551615\n" % name
    assert proctext.parse_process(text) == proctext.ProcessStat("S", 1, 4711)


@given(names)
def test_a_mapping_of_a_file_of_any_name_is_found(name: bytes) -> None:
    name = name.strip(b" \t").replace(b"\\", b"/")
    shown = mangled(name, b"\n")
    text = b"7f00-7f10 r-xp 00000000 fe:00 12     %s\nSize: 64 kB\nAnonymous:  8 kB\n7f20-7f30 rw-p 00000000 00:00 0 \n" % shown
    found = list(proctext.parse_areas(text))
    assert [(area.start, area.end, area.permissions, area.anonymous_bytes) for area in found] == [
        (0x7F00, 0x7F10, "r-xp", 8192),
        (0x7F20, 0x7F30, "rw-p", None),
    ]
    assert os.fsencode(found[0].path) == name and found[1].path == ""


@given(st.binary(max_size=300))
def test_no_text_is_a_bug(text: bytes) -> None:
    proctext.parse_mounts(text)
    proctext.parse_cgroups(text)
    proctext.parse_keyed(text)
    proctext.parse_backing_file(text)
    proctext.word_of(text)


def test_what_str_takes_for_a_separator_is_none(hard: bytes) -> None:
    mount = b"36 35 0:52 / %s rw - fuse.tmemfs tmemfs rw\n" % mangled(hard)
    assert [found.mountpoint for found in proctext.parse_mounts(mount)] == [os.fsdecode(hard)]
    swap = b"Filename Type Size Used Priority\n%s file\t8\t4\t1\n" % mangled(hard)
    assert [found.path for found in proctext.parse_swaps(swap)] == [os.fsdecode(hard)]
    assert proctext.parse_backing_file(hard + b"\n") == os.fsdecode(hard)


def test_figures_have_their_keys() -> None:
    assert proctext.parse_keyed(b"VmSize:\t  12 kB\nName:\ta b\nempty\n\n") == {"VmSize": b"12 kB", "Name": b"a b"}
    assert proctext.parse_keyed(b"cache 5\nswap 7\n", b"swap") == {"swap": b"7"}
    assert proctext.kilobytes(b"12 kB") == 12 << 10


def test_a_line_that_is_torn_is_passed_over() -> None:
    assert proctext.parse_mounts(b"36 35 0:52 / /m rw - \n36 35 x:y / /m rw - a b c\n") == []
    assert proctext.parse_swaps(b"Filename Type Size Used Priority\n/dev/sda2 partition 8\n") == []


def test_a_name_is_shown_on_one_line_of_ascii(hard: bytes) -> None:
    said = proctext.shown(os.fsdecode(hard))
    assert said.isascii() and said.isprintable() and said.startswith("/m/")
