"""The errno table: which number the kernel is told for each error of tmemfs.

One table for both ways out: replies of the page path (replies.py), and handlers of pyfuse3 (contain.py). The rest of tmemfs raises
the errors of errors.py and knows no errno.
"""

from __future__ import annotations

import errno
from typing import Final

from tmemfs.errors import (
    BackingFull,
    BadValue,
    Busy,
    Corrupt,
    FellShort,
    NoAnswer,
    NoSpace,
    OutOfRange,
    Refused,
    TierError,
    TmemfsError,
)

ERRNOS: Final[dict[type[TmemfsError], int]] = {
    BadValue: errno.EINVAL,
    OutOfRange: errno.ERANGE,
    Busy: errno.EBUSY,
    Refused: errno.EACCES,
    NoAnswer: errno.EACCES,
    FellShort: errno.EAGAIN,
    NoSpace: errno.ENOSPC,
    BackingFull: errno.EIO,
    Corrupt: errno.EIO,
    TierError: errno.EIO,
}


def errno_of(error: TmemfsError) -> int:
    """The errno that says most nearly what `error` says; EIO for an error that is not in the table."""
    return ERRNOS.get(type(error), errno.EIO)
