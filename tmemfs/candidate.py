"""The candidate: the process of another version that a supervisor executes to hand over to (handover.py has the whole course).

    python -P -m tmemfs.candidate MANIFEST MOUNTPOINT   an inherited descriptor (manifest.py), and, for people, whose it is

It adopts what the manifest lists, says so, waits for GO, and is a supervisor on trial then (trial.py). An error before that is
printed, for the other supervisor reads the last line. Nothing is changed until the trial is passed.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from tmemfs.backing import import_cipher
from tmemfs.errors import Refused, TmemfsError
from tmemfs.handover import ADOPTS, GO
from tmemfs.holdings import Holdings
from tmemfs.manifest import Manifest
from tmemfs.supervisor import Supervisor, logged_end
from tmemfs.system import memory, own_mount, runtime
from tmemfs.system.log import configure, follow
from tmemfs.system.memory_safety import MemorySafety
from tmemfs.system.rlimits import raise_limits
from tmemfs.trial import Trial


def main() -> NoReturn:
    """Take over, and serve until unmounted."""
    status = 1
    try:
        _take_over(Manifest.decode(_read(int(sys.argv[1]))))
        status = 0
    except TmemfsError as error:
        print(error, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        # Nothing may undo what is not ours yet: no destructor, no handler of the interpreter's end.
        with suppress(Exception):
            sys.stderr.flush()
        os._exit(status)


def _read(fd: int) -> bytes:
    text = os.pread(fd, os.fstat(fd).st_size, 0)
    os.close(fd)
    return text


def _take_over(manifest: Manifest) -> None:
    """Adopt, and serve once the other supervisor says so."""
    _keep_from_children(manifest)
    channel, asker, listener = (socket.socket(fileno=manifest.fds[name]) for name in ("channel", "asker", "listener"))
    safety = MemorySafety()
    raise_limits()
    safety.prepare_process()
    import_cipher(manifest.options)
    safety.lock_current()
    holdings = manifest.adopt(safety)
    trial = Trial(manifest, holdings, channel, asker)
    configure()
    _print_to_log(manifest)
    supervisor = Supervisor(manifest.options, holdings, safety, listener, lambda: None, trial=trial)
    supervisor.keep_spare()  # now, while the other version serves
    channel.send(ADOPTS)
    if channel.recv(len(GO)) != GO:
        raise Refused("the other version goes on")
    memory.outlive_parent()
    try:
        with logged_end(manifest.options):
            supervisor.run()
    finally:
        if trial.is_passed:
            _end(manifest.options.mountpoint, holdings, trial)


def _end(mountpoint: Path, holdings: Holdings, trial: Trial) -> None:
    """The file system was unmounted: close and remove what is left."""
    os.close(holdings.device.fd)
    runtime.status_path(mountpoint).unlink(missing_ok=True)
    runtime.upgrade_path(mountpoint).unlink(missing_ok=True)
    holdings.tier.close()
    if trial.record is not None:
        own_mount.forget(trial.record)


def _keep_from_children(manifest: Manifest) -> None:
    """Close what is inherited when another program is executed: it was to be inherited once."""
    for fd in manifest.fds.values():
        os.set_inheritable(fd, False)
    os.environ.pop("PYTHONPATH", None)


def _print_to_log(manifest: Manifest) -> None:
    """Print where the other version does, or, if that is a file that was renamed meanwhile, to the one that has its name now."""
    for standard, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(manifest.fds[name], standard)
        os.close(manifest.fds[name])
    follow(manifest.options.log)


if __name__ == "__main__":
    main()
