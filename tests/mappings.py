"""What the kernel says of a process's mappings: whether they are locked, and whether a core file would hold them."""

from __future__ import annotations

from pathlib import Path


def flags_of(path: str, pid: int | str = "self") -> list[frozenset[str]]:
    """The VmFlags (proc_pid_smaps(5)) of each mapping of a file whose path begins with `path`."""
    found: list[frozenset[str]] = []
    is_wanted = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            is_wanted = len(words) > 5 and words[5].startswith(path)
        elif is_wanted and words[0] == "VmFlags:":
            found.append(frozenset(words[1:]))
    return found
