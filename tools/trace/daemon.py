"""A recording daemon in the foreground: `python -m tools.trace.daemon OUTPUT DIRECTORY SIZE POOL_MAX`.

Mounts at DIRECTORY/mnt with DIRECTORY/backing, prints 'ready', serves until it is unmounted, and then writes the trace.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from tmemfs.daemon import serve
from tmemfs.errors import TmemfsError
from tmemfs.options import Options
from tmemfs.units import parse_size
from tools.trace.format import write
from tools.trace.recorder import Recording, RecordingPager


def main() -> int:
    """Serve and record."""
    output, directory, size, pool_max = sys.argv[1:]
    options = Options(Path(directory) / "mnt", parse_size(size), pool_max, Path(directory) / "backing")
    recording = Recording()
    try:
        serve(options, lambda: print("ready", flush=True), partial(RecordingPager, recording=recording))
    except TmemfsError as error:
        print(f"trace: {error}", file=sys.stderr)
        return 2
    write(Path(output), recording.columns)
    if recording.left_out:
        print(f"trace: {recording.left_out} requests were left out", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
