"""Another version of tmemfs: a copy of this one with changes, and `tmemfs upgrade` run from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import tmemfs
from tests.waiting import HANG_S, wait_until

_PACKAGE: Final = Path(tmemfs.__file__).parent
#: Defines `pause`, which says that a step is reached, and lasts until it is allowed to go on.
_PAUSE: Final = """

def pause(step: str) -> None:
    import pathlib, time
    place = pathlib.Path({place!r})
    (place / step).write_text(str(os.getpid()))
    while not (place / "go-on").exists():
        time.sleep(0.005)
"""


@dataclass(frozen=True, slots=True)
class OtherVersion:
    """A copy of the package below `root`."""

    root: Path

    @classmethod
    def copy(cls, root: Path) -> OtherVersion:
        """A new copy, the same so far."""
        shutil.copytree(_PACKAGE, root / "tmemfs", ignore=shutil.ignore_patterns("__pycache__"))
        return cls(root)

    def change(self, module: str, old: str, new: str) -> OtherVersion:
        """Replace `old`, which is there once, in a module."""
        file = self.root / "tmemfs" / f"{module}.py"
        text = file.read_text()
        assert text.count(old) == 1, f"{module} has {text.count(old)} times {old!r}"
        file.write_text(text.replace(old, new))
        return self

    def pause_before(self, module: str, line: str, step: str) -> OtherVersion:
        """Have `module` wait before `line`, until `go_on`; `reached` tells the process that waits there."""
        file = self.root / "tmemfs" / f"{module}.py"
        if "def pause(" not in file.read_text():
            self.change(module, "from __future__ import annotations\n", "from __future__ import annotations\nimport os\n")
            self.change(module, "\nclass " if module != "candidate" else "\ndef main", _PAUSE.format(place=str(self.root)) + (
                "\nclass " if module != "candidate" else "\ndef main"
            ))  # fmt: skip
        indent = line[: len(line) - len(line.lstrip())]
        return self.change(module, line, f"{indent}pause({step!r})\n{line}")

    def reached(self, step: str) -> int:
        """Wait until the step is reached; the process that waits there."""
        wait_until(lambda: (self.root / step).exists() and (self.root / step).read_text())
        return int((self.root / step).read_text())

    def go_on(self) -> None:
        """Let everything go on."""
        (self.root / "go-on").touch()

    def run(self, *words: str | Path) -> None:
        """Run a command of this version, which succeeds."""
        code, said = ended(self._start(*words))
        assert code == 0, said

    def command(self, mountpoint: Path) -> subprocess.Popen[str]:
        """Start `tmemfs upgrade` of this version."""
        return self._start("upgrade", mountpoint)

    def _start(self, *words: str | Path) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(self.root)}
        command = [sys.executable, "-P", "-m", "tmemfs", *map(str, words)]
        return subprocess.Popen(command, env=environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def upgrade(self, mountpoint: Path) -> tuple[int, str]:
        """Run `tmemfs upgrade` of this version; its exit code, and what it said."""
        return ended(self.command(mountpoint))


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code of a process, and what it printed, once it has ended."""
    printed, complained = process.communicate(timeout=HANG_S)
    return process.returncode, printed + complained
