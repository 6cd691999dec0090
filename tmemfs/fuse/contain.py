"""One place for every error of a FUSE handler: any exception but a FUSEError ends pyfuse3's main loop, and so the namespace.

`contain` wraps all handlers of an object. A TmemfsError becomes its errno (errnos.py). Any other exception is a bug in tmemfs: it
becomes EIO, and is logged (bugs.py).
"""

from __future__ import annotations

import errno
import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from tmemfs.errors import TmemfsError
from tmemfs.fuse.bugs import Bugs
from tmemfs.fuse.errnos import errno_of
from tmemfs.fuse.library import pyfuse3

Handler = Callable[..., Awaitable[Any]]

#: Every handler that pyfuse3 may call and await.
HANDLERS: Final = tuple(name for name, _ in inspect.getmembers(pyfuse3.Operations, inspect.iscoroutinefunction))
#: A request without a reply, and so without an error.
_NO_REPLY: Final = "forget"


def contain(operations: pyfuse3.Operations) -> None:
    """Have no handler of `operations` raise anything but a FUSEError."""
    bugs = Bugs()
    for name in HANDLERS:
        setattr(operations, name, _contained(getattr(operations, name), bugs, has_reply=name != _NO_REPLY))


def _contained(handler: Handler, bugs: Bugs, has_reply: bool) -> Handler:
    @functools.wraps(handler)
    async def run(*arguments: Any) -> Any:
        try:
            return await handler(*arguments)
        except pyfuse3.FUSEError:
            if has_reply:
                raise
        except TmemfsError as error:
            if has_reply:
                raise pyfuse3.FUSEError(errno_of(error)) from error
        except trio.Cancelled:
            # The event loop has failed. pyfuse3 replies before its next checkpoint, where it is cancelled itself.
            if has_reply:
                raise pyfuse3.FUSEError(errno.EIO) from None
            raise
        except Exception as error:
            bugs.note(error)
            if has_reply:
                raise pyfuse3.FUSEError(errno.EIO) from error
        return None

    return run
