"""The namespace's handlers without a mount: what they raise, what a handle holds, what is refused."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest

from tmemfs.control import Attribute
from tmemfs.control_files import ControlFile
from tmemfs.errors import FellShort, OutOfRange
from tmemfs.fuse import namespace
from tmemfs.fuse.namespace import CONTROL, FIRST_ATTRIBUTE, LONGEST_VALUE_BYTES, ROOT, SWAP, Namespace

ROOTS = SimpleNamespace(uid=0)
OTHERS = SimpleNamespace(uid=1000)
VALUE = FIRST_ATTRIBUTE
BROKEN = FIRST_ATTRIBUTE + 1
SWAP_BYTES = 16 << 20


class Value:
    """An attribute that refuses what it is told to refuse."""

    def __init__(self) -> None:
        self.text = "10"
        self.error: Exception | None = None

    def read(self) -> str:
        return f"{self.text}\n"

    async def write(self, text: str) -> None:
        if self.error is not None:
            raise self.error
        self.text = text.strip()


def broken(*_: object) -> Any:
    raise KeyError("a bug")


@pytest.fixture
def value() -> Value:
    return Value()


@pytest.fixture
def tree(value: Value) -> Namespace:
    files = ControlFile("value", "-", "A value.", is_writable=True), ControlFile("broken", "-", "A bug.", is_writable=True)
    attributes = Attribute(files[0], value.read, value.write), Attribute(files[1], broken, broken)
    return Namespace(attributes, lambda: (SWAP_BYTES, 0))


async def errno_of(doing: Awaitable[Any]) -> int:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await doing
    return int(caught.value.errno)


async def open_value(tree: Namespace, flags: int = os.O_RDWR, context: Any = ROOTS) -> int:
    return int((await tree.open(VALUE, flags, context)).fh)


async def test_a_space_that_cannot_be_told_ends_nothing(tree: Namespace) -> None:
    tree._space = broken
    assert await errno_of(tree.statfs(ROOTS)) == errno.EIO
    assert await errno_of(tree.getattr(SWAP, ROOTS)) == errno.EIO
    assert await errno_of(tree.lookup(ROOT, b"swap", ROOTS)) == errno.EIO


async def test_the_reason_is_read_where_a_value_was_refused(tree: Namespace, value: Value) -> None:
    handle, other = await open_value(tree), await open_value(tree)
    value.error = OutOfRange("a pool limit of 1K is too small to swap with: give 10 MiB or more")
    assert await errno_of(tree.write(handle, 0, b"1K\n")) == errno.ERANGE
    reason = b"a pool limit of 1K is too small to swap with: give 10 MiB or more\n"
    assert await tree.read(handle, 0, 4096) == reason
    assert await tree.read(handle, len(reason), 4096) == b""
    assert await tree.read(handle, 0, 4096) == reason
    assert await tree.read(other, 0, 4096) == b"10\n"
    value.error = FellShort("freed 0 of 1M: the deadline passed")
    assert await errno_of(tree.write(handle, 0, b"1M\n")) == errno.EAGAIN
    assert await tree.read(handle, 0, 4096) == b"freed 0 of 1M: the deadline passed\n"
    value.error = None
    assert await tree.write(handle, 0, b"20\n") == 3
    assert await tree.read(handle, 0, 4096) == b"20\n"
    assert await tree.read(await open_value(tree), 0, 4096) == b"20\n"


async def test_a_reason_is_one_line_of_bounded_length(tree: Namespace, value: Value) -> None:
    handle = await open_value(tree)
    value.error = OutOfRange("no \x1b[31m\n\r\u2028\x00" + "x" * 100_000)
    assert await errno_of(tree.write(handle, 0, b"1")) == errno.ERANGE
    reason = await tree.read(handle, 0, 1 << 20)
    assert reason.startswith(b"no  [31m    xx") and reason.endswith(b"x\n") and len(reason) <= 1001


async def test_a_bug_while_writing_has_a_reason_too(tree: Namespace) -> None:
    handle = (await tree.open(BROKEN, os.O_RDWR, ROOTS)).fh
    assert await errno_of(tree.write(handle, 0, b"1")) == errno.EIO
    assert (await tree.read(handle, 0, 4096)).startswith(b"bug in tmemfs")


@pytest.mark.parametrize(("offset", "data", "says"), [
    (0, b"\xff\xfe", b"UTF-8"), (0, b"1\x00", b"NUL"), (0, b"1" * (LONGEST_VALUE_BYTES + 1), b"at most 4096 bytes, not 4097"),
    (1, b"1", b"offset 0"), (1 << 62, b"1", b"offset 0"), (0, b"\xed\xa0\x80", b"UTF-8"),
])  # fmt: skip
async def test_what_is_no_value_is_refused_with_a_reason(
    tree: Namespace, value: Value, offset: int, data: bytes, says: bytes
) -> None:
    handle = await open_value(tree)
    assert await errno_of(tree.write(handle, offset, data)) == errno.EINVAL
    assert says in await tree.read(handle, 0, 4096)
    assert value.text == "10"


async def test_values_of_any_allowed_length_are_written(tree: Namespace, value: Value) -> None:
    handle = await open_value(tree)
    assert await tree.write(handle, 0, b"1" * LONGEST_VALUE_BYTES) == LONGEST_VALUE_BYTES
    assert value.text == "1" * LONGEST_VALUE_BYTES
    assert await tree.write(handle, 0, b"") == 0


async def test_a_file_that_is_appended_to_takes_a_value_at_any_offset(tree: Namespace, value: Value) -> None:
    handle = await open_value(tree, os.O_WRONLY | os.O_APPEND)
    for text in (b"11\n", b"12\n"):
        await tree.write(handle, 3, text)
    assert value.text == "12"


async def test_nothing_is_kept_of_a_file_that_is_open_or_closed(tree: Namespace, value: Value) -> None:
    value.error = OutOfRange("no: write less")
    handles = [await open_value(tree, context=context) for context in (ROOTS, OTHERS) for _ in range(100)]
    assert not tree._reasons and not tree._texts._ends
    for handle in handles:
        await tree.read(handle, 0, 1)
        assert await errno_of(tree.write(handle, 0, b"1")) == errno.ERANGE
        await tree.release(handle)
    assert not tree._reasons and not tree._texts._ends and not tree._texts._shared and tree._open_by_others == 0


async def test_open_files_of_all_but_root_are_limited(tree: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert namespace.MOST_OPEN_BY_OTHERS > 20_000
    monkeypatch.setattr(namespace, "MOST_OPEN_BY_OTHERS", 3)
    handles = [await open_value(tree, os.O_RDONLY, OTHERS) for _ in range(3)]
    assert await errno_of(tree.open(VALUE, os.O_RDONLY, OTHERS)) == errno.ENFILE
    await open_value(tree, context=ROOTS)
    await tree.release(handles.pop())
    await open_value(tree, os.O_RDONLY, OTHERS)


async def test_handles_of_root_and_of_others_are_told_apart(tree: Namespace, value: Value) -> None:
    roots, others = await open_value(tree, context=ROOTS), await open_value(tree, context=OTHERS)
    assert await tree.read(others, 0, 100) == b"10\n"
    value.text = "11"
    assert await tree.read(others, 0, 100) == b"10\n"
    assert await tree.read(roots, 0, 100) == b"11\n"


async def test_no_handle_that_was_not_given_out_does_harm(tree: Namespace) -> None:
    for handle in (0, 1, 3, 999, 1 << 63):
        assert await errno_of(tree.read(handle, 0, 100)) == errno.EBADF
        assert await errno_of(tree.write(handle, 0, b"1")) == errno.EBADF
        if handle not in (1, 3):
            assert await errno_of(tree.readdir(handle, 0, None)) == errno.ENOTDIR


async def test_dot_and_dot_dot_are_looked_up(tree: Namespace) -> None:
    for inode in (ROOT, SWAP, CONTROL, VALUE):
        assert (await tree.lookup(inode, b".", ROOTS)).st_ino == inode
    assert (await tree.lookup(CONTROL, b"..", ROOTS)).st_ino == ROOT
    assert await errno_of(tree.lookup(CONTROL, b"\xff\n", ROOTS)) == errno.ENOENT
    assert await errno_of(tree.getattr(999, ROOTS)) == errno.ENOENT


async def test_the_image_is_not_truncated_by_opening_it(tree: Namespace) -> None:
    assert await errno_of(tree.open(SWAP, os.O_WRONLY | os.O_TRUNC, ROOTS)) == errno.EPERM


async def test_there_are_no_inodes_to_run_out_of(tree: Namespace) -> None:
    found = await tree.statfs(ROOTS)
    assert (found.f_files, found.f_ffree, found.f_favail) == (0, 0, 0) and found.f_bsize == 4096
