"""`python3 tools/in_use.py DIRECTORY`: exit code 1 and the reasons if a tmemfs is up, or a program runs from DIRECTORY.

For `make clean`, which would otherwise remove the code of a running daemon: the parts of it that are not in RAM are read from its
files. Standard library only, since the virtual environment may be gone. Processes whose mappings this user may not read are
ignored.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

_TYPE = b" fuse.tmemfs "


def mountpoints(table: bytes) -> list[str]:
    """The mountpoints of tmemfs in `table` (/proc/self/mounts), with bytes escaped that are not UTF-8."""
    return [line.split(b" ")[1].decode(errors="backslashreplace") for line in table.split(b"\n") if _TYPE in line]


def processes_from(directory: Path, proc: Path = Path("/proc")) -> list[int]:
    """Processes except this one that have a file below `directory` mapped."""
    below, found = os.fsencode(directory) + b"/", []
    for place in proc.iterdir():
        if place.name.isdigit() and int(place.name) != os.getpid():
            with suppress(OSError):
                if below in (place / "maps").read_bytes():
                    found.append(int(place.name))
    return sorted(found)


def main(directory: Path) -> int:
    """Print the reasons; returns the exit code."""
    reasons = [f"{place} is mounted" for place in mountpoints(Path("/proc/self/mounts").read_bytes())]
    reasons += [f"process {pid} runs from {directory}" for pid in processes_from(directory.absolute())]
    for reason in reasons:
        print(f"clean: {reason}: run 'sudo make down' first (ARGS=MOUNTPOINT), or end it", file=sys.stderr)
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
