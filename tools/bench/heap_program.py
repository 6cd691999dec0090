"""A Python process with a large heap, which answers requests.

    python heap_program.py BASE COUNT BYTES

It keeps COUNT values of BYTES, cut out of the file BASE. On stdin, one per line: `ping` is answered by `pong`, `digest` by a
checksum of every value. Standard library only, so that nothing but the heap is large.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

#: Moves the values of neighbouring numbers far apart.
_SPREAD = 2654435761


def values(base: bytes, count: int, size_bytes: int) -> dict[int, bytes]:
    """The heap."""
    last = len(base) - size_bytes
    return {number: base[(at := number * _SPREAD % last) : at + size_bytes] for number in range(count)}


def digest(heap: dict[int, bytes]) -> str:
    """The checksum of all values, which touches every page of them."""
    found = 0
    for value in heap.values():
        found = zlib.crc32(value, found)
    return f"{found:08x}"


def main() -> None:
    """Fill the heap, and answer until stdin ends."""
    heap = values(Path(sys.argv[1]).read_bytes(), int(sys.argv[2]), int(sys.argv[3]))
    print("ready", flush=True)
    for line in sys.stdin:
        print(digest(heap) if line.strip() == "digest" else "pong", flush=True)


if __name__ == "__main__":
    main()
