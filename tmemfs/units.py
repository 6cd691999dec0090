"""Sizes and durations as people write them, and back.

Knows nothing of what a size limits. `parse_size` takes what cgroup v2 files take (bytes, K/M/G/T with an optional
'iB' or 'B', all powers of 1024) and, where the caller names a whole, 'N%' and 'max'.
"""

from __future__ import annotations

import re
from typing import Final

from tmemfs.errors import BadValue

PAGE_BYTES: Final = 4096
#: Unit of writes to a tier, and their alignment; reads may be by sectors (`Tier.sector_bytes`).
BLOCK_BYTES: Final = 4096
#: What most disks can be asked for, at least.
SECTOR_BYTES: Final = 512
#: A segment, in a frame of RAM or an extent of a tier.
SEGMENT_BYTES: Final = 1 << 20
MIB: Final = 1 << 20
GIB: Final = 1 << 30

_EXPONENT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"(\d{1,40}(?:\.\d{1,40})?)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)
_PERCENT = re.compile(r"(\d{1,40}(?:\.\d{1,40})?)\s*%")
_SECONDS = re.compile(r"(\d{1,40}(?:\.\d{1,40})?)\s*(ms|s|m|)")
#: From here on three digits round to 1000.
_THREE_DIGITS: Final = 999.5
_SECONDS_PER = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0}


def parse_size(text: str, whole_bytes: int | None = None) -> int:
    """Bytes meant by `text`; 'N%' and 'max' are shares of `whole_bytes`, where one is given. Raises BadValue."""
    word = text.strip()
    if whole_bytes is not None:
        if word.lower() == "max":
            return whole_bytes
        if share := _PERCENT.fullmatch(word):
            return int(whole_bytes * float(share[1]) / 100)
    if size := _SIZE.fullmatch(word):
        return (
            int(float(size[1]) * (1 << _EXPONENT[size[2].upper()]))
            if "." in size[1]
            else int(size[1]) << _EXPONENT[size[2].upper()]
        )
    accepted = "bytes or a number with K, M, G or T" + (", N% or max" if whole_bytes is not None else "")
    raise BadValue(f"{text.strip()!r} is not a size: give {accepted}, for example 512M")


def parse_seconds(text: str) -> float:
    """Seconds meant by '2s', '500ms', '1m' or a bare number. Raises BadValue."""
    if match := _SECONDS.fullmatch(text.strip()):
        return float(match[1]) * _SECONDS_PER[match[2]]
    raise BadValue(f"{text.strip()!r} is not a duration: give seconds, for example 2s or 500ms")


def format_size(size_bytes: float) -> str:
    """A size for people: three significant digits, powers of 1024 ('1.5 GiB')."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(size_bytes) >= _THREE_DIGITS and len(units) > 1:
        size_bytes /= 1024
        del units[0]
    is_whole = units[0] == "B" or abs(size_bytes) >= _THREE_DIGITS
    return f"{size_bytes:.0f} {units[0]}" if is_whole else f"{size_bytes:.3g} {units[0]}"
