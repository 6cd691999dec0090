"""The errno table: an errno for every error, as the docstring of the errors says it."""

from __future__ import annotations

import errno
import re
from typing import Final

import pytest

from tmemfs import errors
from tmemfs.errors import TmemfsError
from tmemfs.fuse.errnos import ERRNOS, errno_of

ERRORS: Final = [
    found
    for found in vars(errors).values()
    if isinstance(found, type) and issubclass(found, TmemfsError) and found is not TmemfsError
]


def documented_errnos() -> dict[str, int]:
    """The errno of each error that has one, from the docstring of the errors."""
    assert errors.__doc__
    return {name: getattr(errno, number) for name, number in re.findall(r"^  (\w+) .*\((E[A-Z]+)", errors.__doc__, re.MULTILINE)}


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_has_its_documented_errno(kind: type[TmemfsError]) -> None:
    assert kind in ERRNOS
    assert errno_of(kind("why: what next")) == documented_errnos().get(kind.__name__, errno_of(kind("")))


def test_the_errnos_are_these() -> None:
    assert {kind.__name__: errno.errorcode[errno_of(kind(""))] for kind in ERRORS} == {
        "BadValue": "EINVAL",
        "OutOfRange": "ERANGE",
        "Busy": "EBUSY",
        "Refused": "EACCES",
        "NoAnswer": "EACCES",
        "NoSpace": "ENOSPC",
        "FellShort": "EAGAIN",
        "TierError": "EIO",
        "BackingFull": "EIO",
        "Corrupt": "EIO",
    }


def test_an_error_without_an_errno_is_eio() -> None:
    class Unheard(TmemfsError):
        pass

    assert errno_of(Unheard("new")) == errno.EIO
