"""How `up` and `mount` start a daemon: its options, the default directories, and the process that serves.

Knows nothing of loop devices and swap (lifecycle.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from tmemfs import __version__
from tmemfs.cli import defaults
from tmemfs.errors import BadValue, Refused
from tmemfs.system.memory import total_ram_bytes
from tmemfs.units import PAGE_BYTES, parse_size

if TYPE_CHECKING:
    from tmemfs.options import Options

#: Serves until the mount ends. It calls its argument when the mount answers.
Serve: TypeAlias = Callable[[Callable[[], None]], None]

#: What a second `up` compares with (differences.py), besides the size.
_RECORDED: Final = ("pool_max", "backing", "backing_max", "codec", "kernel_tuning", "encrypt", "watchdog", "latency", "log")


def swap_bytes(text: str | None) -> int:
    """The size that `--size` means, twice the RAM where it is not given. Raises BadValue."""
    if text is None:
        return total_ram_bytes() * 2 // PAGE_BYTES * PAGE_BYTES
    size = parse_size(text) if not text.startswith("-") else -1
    if size <= 0 or size % PAGE_BYTES:
        raise BadValue(f"--size {text} is not a positive multiple of the page ({PAGE_BYTES}): give for example 8G")
    return size


def server(arguments: argparse.Namespace) -> Serve:
    """The function that runs the daemon with these arguments. Raises BadValue."""
    return partial(_serve, arguments, swap_bytes(arguments.size))


def _serve(arguments: argparse.Namespace, size: int, ready: Callable[[], None]) -> None:
    # imported in the process that becomes the daemon: the command in front would only load what it never uses
    from tmemfs import supervisor
    from tmemfs.system import own_mount, runtime
    from tmemfs.system.log import configure

    values = {"size": str(size)} | {name.replace("_", "-"): str(getattr(arguments, name)) for name in _RECORDED}
    recorded: list[runtime.MountRecord] = []

    def answers() -> None:
        # before the caller is told: the next command finds the mount by its record
        recorded.append(own_mount.record_of(arguments.mountpoint, __version__, values))
        runtime.write_record(recorded[0])
        ready()

    configure()
    with _default_directories(arguments):
        supervisor.serve(_options(arguments, size), answers)
    # only after an unmount: a daemon that failed may leave a loop device, which `down` finds by the record
    for record in recorded:
        own_mount.forget(record)


def _options(arguments: argparse.Namespace, size: int) -> Options:
    from tmemfs.jobs.pulse import parse_watchdog
    from tmemfs.options import Options
    from tmemfs.system.swapdev import resolved

    return Options(
        mountpoint=resolved(arguments.mountpoint),
        swap_bytes=size,
        pool_max=arguments.pool_max,
        backing=None if arguments.backing == "none" else Path(arguments.backing),
        backing_max=arguments.backing_max,
        codec=arguments.codec,
        # in the foreground standard output belongs to the service manager
        log=None if getattr(arguments, "foreground", False) else arguments.log,
        kernel_tuning=arguments.kernel_tuning,
        encrypt=arguments.encrypt == "on",
        watchdog_s=parse_watchdog(arguments.watchdog),
        latency=arguments.latency,
    )


def start_in_background(serve: Serve, log: Path) -> None:
    """Start a daemon in the background; returns when its mount answers. Raises Refused."""
    from tmemfs.system.background import run_in_background

    run_in_background(serve, log)


@contextmanager
def _default_directories(arguments: argparse.Namespace) -> Iterator[None]:
    """Create the directories that are used by default, and remove them again if the daemon fails. Given ones have to exist."""
    assumed = [defaults.MOUNTPOINT] if arguments.mountpoint == defaults.MOUNTPOINT else []
    assumed += [defaults.BACKING.parent] if arguments.backing == str(defaults.BACKING) else []
    created = [directory for directory in assumed if _make_directory(directory)]
    try:
        yield
    except BaseException:
        for directory in created:
            with suppress(OSError):
                directory.rmdir()
        raise


def _make_directory(directory: Path) -> bool:
    """Whether `directory` had to be created. Raises Refused."""
    try:
        directory.mkdir(parents=True, mode=0o700)
    except FileExistsError:
        return False
    except OSError as error:
        raise Refused(f"cannot create {directory} ({error.strerror}): give another mountpoint or --backing") from error
    return True
