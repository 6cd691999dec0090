"""The command, with a daemon whose workers die: `python -m tests.dying_daemon COMMAND ...`.

The first worker serves as ever, until somebody kills it. Each later one ends before it has answered anything.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial

from tmemfs import cli, supervisor
from tmemfs.holdings import Holdings
from tmemfs.options import Options
from tmemfs.system.memory_safety import MemorySafety
from tmemfs.worker import Birth, run_worker


def run_first(options: Options, holdings: Holdings, safety: MemorySafety, birth: Birth, announce: Callable[[], None]) -> None:
    """Be a worker, if it is the first one."""
    if birth.generation > 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    run_worker(options, holdings, safety, birth, announce)


if __name__ == "__main__":
    setattr(supervisor, "serve", partial(supervisor.serve, run=run_first))  # noqa: B010
    sys.exit(cli.main(sys.argv[1:]))
