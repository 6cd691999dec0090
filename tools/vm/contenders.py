"""The swaps that are compared inside the guest: tmemfs, zram, and zswap over a swap file. Each is the only swap, of the same size.

Every program that is started here gets an ordinary OOM score, even if its parent is protected. Sources: Documentation/
admin-guide/blockdev/zram.rst, admin-guide/mm/zswap.rst.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from tools.vm.evidence import flat, numbers

SWAP_BYTES: Final = 2 << 30
POOL_PERCENT: Final = 60
#: zswap's allocator: zbud holds two pages in one, and can write them back on every kernel that has it.
ZPOOL: Final = "zbud"
#: One heap that is never released: the observer faults it in at its start, and needs no page when none is free.
KEPT_HEAP: Final = {
    "PYTHONMALLOC": "malloc",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_MAX_": "0",
}
_COMMAND_S: Final = 240.0
_UNPROTECTED: Final = f'unset {" ".join(KEPT_HEAP)}; echo 0 > /proc/self/oom_score_adj; exec "$@"'


class Contender(Protocol):
    """A swap that can be turned on and off."""

    name: str

    def up(self) -> None:
        """Turn it on as the only swap."""

    def down(self) -> None:
        """Turn it off."""

    def pool_bytes(self) -> int:
        """The RAM that its compressed pages take now."""

    def stat(self) -> dict[str, str]:
        """Its counters."""

    def keep(self, results: Path) -> None:
        """Copy its logs and counters to `results`."""


def unprotected(command: Sequence[str]) -> list[str]:
    """`command` with the OOM score and the heap settings of any program."""
    return ["sh", "-c", _UNPROTECTED, "sh", *command]


def run(*command: str, seconds: float = _COMMAND_S) -> str:
    """The output of `command`. Raises CalledProcessError, TimeoutExpired."""
    done = subprocess.run(unprotected(command), capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def swap_device() -> str:
    """The path of the only swap."""
    rows = Path("/proc/swaps").read_text().splitlines()[1:]
    return rows[0].split()[0] if rows else ""


class Tmemfs:
    """tmemfs with its backing on the guest's disk."""

    name = "tmemfs"

    def __init__(self, disk: Path) -> None:
        self._disk = disk
        self.mountpoint = Path("/run/tmemfs")
        self._log = Path("/run/tmemfs.log")

    def up(self) -> None:
        """Mount, and turn the swap on."""
        self.mountpoint.mkdir(exist_ok=True)
        options = [
            f"--size={SWAP_BYTES}",
            f"--pool-max={POOL_PERCENT}%",
            f"--backing={self._disk / 'backing'}",
            f"--log={self._log}",
        ]
        self.command("up", str(self.mountpoint), *options)

    def down(self) -> None:
        """Turn the swap off, and unmount."""
        self.command("down", str(self.mountpoint), "--force")

    def command(self, *arguments: str) -> str:
        """Run tmemfs."""
        return run(sys.executable, "-m", "tmemfs", *arguments)

    def pool_bytes(self) -> int:
        """The resident bytes of the arena, as the kernel counts them."""
        return int(self.stat()["pool_resident"])

    def stat(self) -> dict[str, str]:
        """control/stat and control/events."""
        return {**self._control("stat"), **self._control("events")}

    def keep(self, results: Path) -> None:
        """Copy the log and the control files."""
        if self._log.exists():
            (results / "daemon.log").write_bytes(self._log.read_bytes())
        for name in ("stat", "events", "state", "segments"):
            (results / f"control.{name}").write_bytes((self.mountpoint / "control" / name).read_bytes())

    def _control(self, name: str) -> dict[str, str]:
        return flat((self.mountpoint / "control" / name).read_text())


class Zram:
    """zram of the same size with the same codec."""

    name = "zram"
    _block = Path("/sys/block/zram0")

    def up(self) -> None:
        """Create the device, and turn the swap on."""
        run("modprobe", "zram")
        (self._block / "comp_algorithm").write_text("lz4")
        (self._block / "disksize").write_text(str(SWAP_BYTES))
        run("mkswap", "/dev/zram0")
        run("swapon", "--discard", "/dev/zram0")

    def down(self) -> None:
        """Turn the swap off; the device ends with the guest."""
        run("swapoff", "/dev/zram0")

    def pool_bytes(self) -> int:
        """mem_used_total."""
        return int(self.stat()["mem_used_total"])

    def stat(self) -> dict[str, str]:
        """mm_stat."""
        names = ("orig_data_size", "compr_data_size", "mem_used_total", "mem_limit", "mem_used_max")
        return dict(zip(names, (self._block / "mm_stat").read_text().split(), strict=False))

    def keep(self, results: Path) -> None:
        """Its counters."""
        (results / "mm_stat").write_text((self._block / "mm_stat").read_text())


class Zswap:
    """zswap with the same limit as the pool of tmemfs, over a swap file on the guest's disk."""

    name = "zswap"
    _parameters = Path("/sys/module/zswap/parameters")
    _debug = Path("/sys/kernel/debug/zswap")

    def __init__(self, disk: Path) -> None:
        self._file = disk / "swapfile"

    def up(self) -> None:
        """Create the file, and turn zswap and the swap on."""
        run("modprobe", ZPOOL)
        run("modprobe", "lz4")
        for name, value in (("compressor", "lz4"), ("zpool", ZPOOL), ("max_pool_percent", str(POOL_PERCENT)), ("enabled", "Y")):
            (self._parameters / name).write_text(value)
        run("fallocate", "--length", str(SWAP_BYTES), str(self._file))
        self._file.chmod(0o600)
        run("mkswap", str(self._file))
        run("swapon", str(self._file))

    def down(self) -> None:
        """Turn the swap off."""
        run("swapoff", str(self._file))

    def pool_bytes(self) -> int:
        """pool_total_size."""
        return int(self.stat()["pool_total_size"])

    def stat(self) -> dict[str, str]:
        """The counters in debugfs, and the parameters."""
        return {file.name: file.read_text().strip() for file in (*self._debug.iterdir(), *self._parameters.iterdir())}

    def keep(self, results: Path) -> None:
        """Its counters."""
        (results / "zswap").write_text("".join(f"{key} {value}\n" for key, value in self.stat().items()))


def contender(name: str, disk: Path) -> Contender:
    """The contender of that name, with its file in `disk`."""
    if name == "zram":
        return Zram()
    return Zswap(disk) if name == "zswap" else Tmemfs(disk)


def swap_counts() -> tuple[int, int]:
    """Pages swapped in and out since boot, and OOM kills."""
    counts = numbers(Path("/proc/vmstat").read_text())
    return sum(counts.get(key, 0) for key in ("pswpin", "pswpout", "zswpin", "zswpout")), counts["oom_kill"]
