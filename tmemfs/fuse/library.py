"""pyfuse3, imported without importlib.metadata, which it uses only to find its own version.

pyfuse3 asks importlib.metadata for its version when it is imported. That module brings e-mail, zip, csv and three compressors,
which the daemon would keep locked in RAM: 1.7 MB (3.5.0 on Python 3.11). So pyfuse3 finds a stand-in that knows no version. A
pyfuse3 that needs more than the stand-in provides gets the real module.

Everything here that needs pyfuse3 takes it from this module.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Final

__all__ = ["pyfuse3"]

_METADATA: Final = "importlib.metadata"


class _PackageNotFoundError(ImportError):
    """What the stand-in knows of every package."""


def _version(distribution_name: str) -> str:
    raise _PackageNotFoundError(distribution_name)


@contextmanager
def _without_metadata() -> Iterator[None]:
    """importlib.metadata is the stand-in; no change where the real one is there already."""
    if _METADATA in sys.modules:
        yield
        return
    stand_in = ModuleType(_METADATA)
    stand_in.__dict__.update(PackageNotFoundError=_PackageNotFoundError, version=_version)
    sys.modules[_METADATA] = stand_in
    try:
        yield
    finally:
        del sys.modules[_METADATA]


try:
    with _without_metadata():
        import pyfuse3
except ImportError:
    import pyfuse3
