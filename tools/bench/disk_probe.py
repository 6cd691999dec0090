"""Finds out whether a limit of the disk holds, before anything is compared on it: fio does more than the limits allow."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

from tmemfs.errors import Refused
from tools.bench.disk import DiskLimits
from tools.bench.disk_watch import SPAN_S, Check, DiskWatch

_PROBE_S: Final = int(2 * SPAN_S)
_FILE_BYTES: Final = 32 << 20
#: Jobs that meet the limits of bytes, and of requests.
_JOBS: Final = (("write", "1m", 4), ("randread", "4k", 32))
_COMMAND_S: Final = 120


def probe(disk: DiskLimits, directory: Path) -> Check:
    """What fio makes the disk do below `directory`. Raises Refused if that is more than the limits allow."""
    with DiskWatch(disk) as watch:
        for access, block, depth in _JOBS:
            _fio(directory / "probe", access, block, depth)
    check = Check.of(0, "fio", "probe", watch.samples, disk.profile.limits)
    if check.excess:
        raise Refused(f"the limits of the disk do not hold ({check.excess}): is this process in a group of block I/O of its own?")
    return check


def _fio(file: Path, access: str, block: str, depth: int) -> None:
    command = ["fio", "--name=probe", f"--filename={file}", f"--size={_FILE_BYTES}", f"--rw={access}", f"--bs={block}",
               f"--iodepth={depth}", "--direct=1", "--ioengine=libaio", "--time_based", f"--runtime={_PROBE_S}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    if done.returncode:
        raise Refused(f"fio could not use the disk: {(done.stderr or done.stdout).strip()[-500:]}")
