"""Pages of a real process: anonymous memory of a Python interpreter, and as many different ones as wanted.

Generated patterns compress unlike anything that a machine swaps. So the demonstration, tests and benchmarks take the heap of a
Python that has imported a good part of the standard library. `RealPages` stamps each copy with its number, so that no two are
alike.

The heap is that of a child (`python -m tmemfs.cli.real_pages MOST` writes its pages), so it does not depend on what the caller has
imported. Zero pages are left out: they take no memory in a store.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Final

from tmemfs.system.proctext import parse_areas
from tmemfs.units import PAGE_BYTES

_MODULES: Final = (
    "argparse", "asyncio", "concurrent.futures", "configparser", "csv", "ctypes", "decimal", "difflib", "doctest",
    "email.message", "fractions", "http.client", "http.server", "inspect", "json", "logging.config", "mimetypes",
    "multiprocessing", "optparse", "pickletools", "plistlib", "pydoc", "sqlite3", "ssl", "statistics", "tarfile", "tomllib",
    "turtledemo", "typing", "unittest.mock", "urllib.request", "uuid", "xml.dom.minidom", "xmlrpc.client", "zipfile",
)  # fmt: skip
_STAMP_BYTES: Final = 16


def heap_pages(most: int = 8192) -> list[bytes]:
    """Up to `most` different anonymous pages of another interpreter, none of them a zero page."""
    command = [sys.executable, "-m", "tmemfs.cli.real_pages", str(most)]
    heap = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parents[2]).stdout
    return [heap[at : at + PAGE_BYTES] for at in range(0, len(heap), PAGE_BYTES)]


def _own_heap_pages(most: int) -> list[bytes]:
    for name in _MODULES:
        try:
            importlib.import_module(name)
        except ImportError:  # a distribution may leave a module out; any large heap will do
            continue
    pages: dict[bytes, None] = {}
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        for start, end in _anonymous_areas():
            for address in range(start, end, PAGE_BYTES):
                page = _read(memory.fileno(), address)
                if page is not None and page.count(0) < PAGE_BYTES:
                    pages[page] = None
                if len(pages) >= most:
                    return list(pages)
    return list(pages)


def _read(fd: int, address: int) -> bytes | None:
    try:
        page = os.pread(fd, PAGE_BYTES, address)
    except OSError:  # the area was unmapped since its line in maps was read
        return None
    return page if len(page) == PAGE_BYTES else None


def _anonymous_areas() -> list[tuple[int, int]]:
    areas = parse_areas(Path("/proc/self/maps").read_bytes())
    return [(area.start, area.end) for area in areas if "rw" in area.permissions and area.path in ("", "[heap]")]


class RealPages:
    """An endless supply: page `number` is a heap page, stamped with the number and the seed at a place that varies."""

    def __init__(self, seed: int = 0) -> None:
        self._pages = heap_pages()
        self._seed = seed
        Random(seed).shuffle(self._pages)

    def page(self, number: int) -> bytes:
        """One page; the same for the same number, different from all others."""
        base = self._pages[number % len(self._pages)]
        at = number * 64 % (PAGE_BYTES - _STAMP_BYTES)
        stamp = number.to_bytes(8, "little") + self._seed.to_bytes(8, "little")
        return base[:at] + stamp + base[at + _STAMP_BYTES :]


if __name__ == "__main__":
    sys.stdout.buffer.write(b"".join(_own_heap_pages(int(sys.argv[1]))))
