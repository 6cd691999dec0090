"""Hostile readers: processes of the user nobody that open, read, stat and statfs whatever they can, and keep many files open."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tools.interrupts import usual_signals

#: A program without imports of ours, so that the user nobody need not read this checkout. Exit code 1: an error no reader may see.
_PROGRAM: Final = """
import errno, os, sys, time
root, seconds, handles = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
control = os.path.join(root, "control")
expected = {getattr(errno, name) for name in "EACCES EPERM EMFILE ENFILE EAGAIN EBUSY ENOENT EINTR ENOMEM".split()}
end, kept, steps = time.monotonic() + seconds, [], 0
while time.monotonic() < end:
    for name in ("", "swap", "no such file", *("control/" + name for name in os.listdir(control))):
        path, fd = os.path.join(root, name), None
        for step in (os.stat, os.statvfs, lambda path: os.open(path, os.O_RDONLY)):
            try:
                got = step(path)
                steps += 1
                if isinstance(got, int):
                    fd = got
                    os.read(fd, 1 << 20) if name else None
            except OSError as error:
                if error.errno not in expected:
                    print(path, error)
                    sys.exit(1)
        if fd is not None:
            kept.append(fd)
        if len(kept) > handles:
            for one in kept:
                os.close(one)
            kept = []
    try:
        os.open(os.path.join(root, "swap"), os.O_RDWR)
        print("nobody may open the image for writing")
        sys.exit(1)
    except OSError:
        pass
print(steps)
"""


@dataclass(slots=True)
class Readers:
    """The running readers, and what those that ended have done."""

    seconds: float = 5.0
    handles: int = 800
    _running: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, mountpoint: Path, count: int = 2) -> int:
        """Start some more, unless many run; returns how many."""
        if len(self._running) > 6:
            return 0
        nobody = pwd.getpwnam("nobody")
        command = [
            os.path.realpath(sys.executable),
            "-I",
            "-S",
            "-c",
            _PROGRAM,
            str(mountpoint),
            str(self.seconds),
            str(self.handles),
        ]
        for _ in range(count):
            self._running.append(subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/",
                user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[], preexec_fn=usual_signals,
            ))  # fmt: skip
        return count

    def ended(self, wait_s: float | None = None) -> tuple[int, list[str]]:
        """The steps of those that have ended since the last call, and messages of failed ones. With `wait_s` waits for all."""
        steps, faults = 0, list[str]()
        for process in list(self._running):
            if wait_s is None and process.poll() is None:
                continue
            self._running.remove(process)
            try:
                said, _ = process.communicate(timeout=wait_s)
            except subprocess.TimeoutExpired:
                process.kill()
                faults.append(f"a reader did not end within {wait_s} s")
                continue
            if process.returncode:
                faults.append(f"a reader of the user nobody failed: {said.strip()[-300:]}")
            else:
                steps += int(said)
        return steps, faults

    def kill(self) -> None:
        """End all, at once."""
        for process in self._running:
            process.kill()
            process.wait()
        self._running.clear()
