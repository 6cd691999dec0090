"""Whatever a handler of the file system raises becomes an errno for the one who asked."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Any

import pyfuse3
import pytest
import trio

from tmemfs.errors import Busy
from tmemfs.fuse.contain import HANDLERS, contain
from tmemfs.fuse.namespace import Namespace


async def errno_of(doing: Awaitable[Any]) -> int:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await doing
    return int(caught.value.errno)


class Raising(pyfuse3.Operations):
    """Every handler raises `error`."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        for name in HANDLERS:
            setattr(self, name, self._raising(error))
        contain(self)

    def _raising(self, error: Exception) -> Callable[..., Awaitable[Any]]:
        async def handler(*arguments: Any) -> Any:
            raise error

        return handler


def test_every_handler_of_the_namespace_is_contained() -> None:
    tree = Namespace((), lambda: (0, 0))
    assert "lookup" in HANDLERS and "forget" in HANDLERS and len(HANDLERS) > 25
    assert all(hasattr(getattr(tree, name), "__wrapped__") for name in HANDLERS)


@pytest.mark.parametrize("name", [name for name in HANDLERS if name != "forget"])
@pytest.mark.parametrize(("error", "number"), [
    (RuntimeError("a bug"), errno.EIO), (MemoryError(), errno.EIO), (ExceptionGroup("bugs", [ValueError()]), errno.EIO),
    (Busy("not now: later"), errno.EBUSY), (pyfuse3.FUSEError(errno.ENOTTY), errno.ENOTTY),
])  # fmt: skip
async def test_whatever_a_handler_raises_is_an_errno(name: str, error: Exception, number: int) -> None:
    assert await errno_of(getattr(Raising(error), name)(1, 2, 3)) == number


@pytest.mark.parametrize("error", [RuntimeError("a bug"), Busy("not now: later"), pyfuse3.FUSEError(errno.EIO)])
async def test_a_handler_without_a_reply_raises_nothing(error: Exception) -> None:
    await Raising(error).forget([(1, 1)])


async def test_a_bug_is_logged_once_for_each_place(caplog: pytest.LogCaptureFixture) -> None:
    operations = Raising(RuntimeError("a bug"))
    for name in ("lookup", "lookup", "read"):
        assert await errno_of(getattr(operations, name)(1, 2, 3)) == errno.EIO
    assert [record.message for record in caplog.records] == ["bug in tmemfs, please report it"]


class Waiting(pyfuse3.Operations):
    """Reads wait until they are cancelled."""

    def __init__(self) -> None:
        super().__init__()
        contain(self)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Wait."""
        await trio.sleep_forever()
        return b""

    async def forget(self, inode_list: Any) -> None:
        """Wait."""
        await trio.sleep_forever()


async def test_a_request_that_is_cancelled_is_answered() -> None:
    """The event loop has failed: who asked would wait for ever, beyond any signal."""
    with trio.CancelScope() as scope:
        scope.cancel()
        assert await errno_of(Waiting().read(1, 0, 10)) == errno.EIO
        await Waiting().forget([(1, 1)])
    assert scope.cancelled_caught
