"""A recording daemon in the foreground: `python -m tools.trace.daemon OUTPUT DIRECTORY SIZE POOL_MAX`.

Mounts at DIRECTORY/mnt with DIRECTORY/backing, prints 'ready', serves until it is unmounted, and then writes the trace.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from tmemfs.errors import TmemfsError
from tmemfs.holdings import Holdings
from tmemfs.options import Options
from tmemfs.supervisor import serve
from tmemfs.system.memory_safety import MemorySafety
from tmemfs.units import parse_size
from tmemfs.worker import Announce, Birth, run_worker
from tools.trace.format import write
from tools.trace.recorder import Recording, RecordingPager


def main() -> int:
    """Serve and record."""
    output, directory, size, pool_max = sys.argv[1:]
    options = Options(Path(directory) / "mnt", parse_size(size), pool_max, Path(directory) / "backing")
    try:
        serve(options, lambda: print("ready", flush=True), partial(_record, Path(output)))
    except TmemfsError as error:
        print(f"trace: {error}", file=sys.stderr)
        return 2
    return 0


def _record(output: Path, options: Options, holdings: Holdings, safety: MemorySafety, birth: Birth, announce: Announce) -> None:
    """Be a worker, which alone knows what it was asked."""
    recording = Recording()
    run_worker(options, holdings, safety, birth, announce, partial(RecordingPager, recording=recording))
    write(output, recording.columns)
    if recording.left_out:
        print(f"trace: {recording.left_out} requests were left out", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
