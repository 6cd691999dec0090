"""The commands: one function each, which takes the parsed arguments and returns the exit code.

Each function imports what it needs. So `tmemfs --version` loads nothing, and `down` works with the standard library alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tmemfs.cli import defaults
from tmemfs.errors import BadValue, Busy, NoAnswer, Refused

if TYPE_CHECKING:
    from tmemfs.cli.health import Health


def up(arguments: argparse.Namespace) -> int:
    """Mount, attach a loop device and turn the swap on; steps that are done already are left out."""
    from tmemfs.cli import lifecycle, start, targets
    from tmemfs.cli.differences import refuse_differences
    from tmemfs.cli.view import print_stat, print_what_next
    from tmemfs.system.capabilities import require_root

    # options are checked before the rights: an ordinary user gets to know what is wrong with them
    serve = start.server(arguments)
    require_root()
    given = {name.replace("_", "-"): text for name, text in arguments.given.items() if not name.startswith("mountpoint")}
    with targets.of(arguments.mountpoint, "up") as target:
        done = lifecycle.up(
            target,
            arguments.priority,
            compare=lambda: refuse_differences(target, given),
            start=lambda: start.start_in_background(serve, arguments.log),
        )
        print(f"{target.mountpoint}: {done}")
        with suppress(NoAnswer):  # it is up all the same
            print_stat(target.mountpoint)
    print_what_next(target.mountpoint)
    return 0


def down(arguments: argparse.Namespace) -> int:
    """Turn the swap off, detach the loop device and unmount; clean up after a daemon that was killed."""
    from tmemfs.cli import lifecycle, targets
    from tmemfs.cli.view import Bar
    from tmemfs.system.capabilities import require_root

    require_root()
    # the lock before the bar: a wait for another command is reported on stderr
    with targets.of(arguments.mountpoint, "down") as target, Bar("swapping in") as bar:
        print(f"{target.mountpoint}: {lifecycle.down(target, arguments.force, bar.left, _say)}")
    # after the daemon: one that ends in order restores them itself
    _restore_kernel_settings()
    return 0


def _say(said: str) -> None:
    """Say what a command waits for."""
    print(f"tmemfs: {said}", file=sys.stderr, flush=True)


def _restore_kernel_settings() -> None:
    """Restore what killed daemons left changed. Raises Refused, Busy."""
    from tmemfs.system.kernel_settings import KernelSettings

    try:
        with closing(KernelSettings()) as settings:
            settings.restore_leftovers()
    except OSError as error:
        raise Refused(f"kernel settings may stay changed ({error}): see tmemfs doctor") from error


def mount(arguments: argparse.Namespace) -> int:
    """Mount the file system only."""
    from tmemfs.cli import lifecycle, start, targets
    from tmemfs.system import background
    from tmemfs.system.capabilities import require_root

    serve = start.server(arguments)
    require_root()
    if arguments.foreground:
        # before a lock's file is opened, which would be closed as well
        background.open_standard_descriptors()
        background.close_inherited()
    with ExitStack() as until_it_answers:
        target = until_it_answers.enter_context(targets.of(arguments.mountpoint, "mount"))
        lifecycle.refuse_taken(target)
        if arguments.foreground:
            # the lock is released when the mount answers: held on, it would keep out the `down` that ends it
            serve(until_it_answers.close)
        else:
            start.start_in_background(serve, arguments.log)
            print(f"{target.mountpoint}: mounted")
    return 0


def umount(arguments: argparse.Namespace) -> int:
    """Unmount, unless the image is in use."""
    from tmemfs.cli import lifecycle, targets
    from tmemfs.system.capabilities import require_root

    require_root()
    with targets.of(arguments.mountpoint, "umount") as target:
        lifecycle.umount(target)
        print(f"{target.mountpoint}: unmounted")
    return 0


def upgrade(arguments: argparse.Namespace) -> int:
    """Have this version serve a mount of another one, which goes on if that fails."""
    from tmemfs.cli import targets, upgrade
    from tmemfs.system.capabilities import require_root

    require_root()
    with targets.of(arguments.mountpoint, "upgrade") as target:
        print(f"{target.mountpoint}: {upgrade.upgrade(target)}")
    return 0


def stat(arguments: argparse.Namespace) -> int:
    """Show control/stat in the form that is asked for."""
    from tmemfs.cli import targets, view
    from tmemfs.units import format_size

    mountpoint = targets.readable_at(arguments.mountpoint)
    try:
        if health := _health(arguments.mountpoint):
            health.refuse_if_silent()
        _print_stat(arguments, mountpoint)
        return 0
    except NoAnswer as error:
        health = _health(arguments.mountpoint)
        if health is None:
            raise NoAnswer(f"{mountpoint} does not answer ({error}): run it as root to see why") from error
        # the other forms are read by programs, which have to learn that these are not all figures
        if arguments.json or arguments.raw or arguments.output is not None:
            raise NoAnswer(f"{mountpoint} does not answer: {health.why}") from error
        view.print_rows(health.rows(str if arguments.bytes else format_size), not arguments.noheadings)
        return 1


def _health(mountpoint: Path) -> Health | None:
    """That of the worker, None where nobody says anything or only root may know."""
    from tmemfs.cli import health, targets

    with suppress(Refused, OSError):
        return health.look(targets.find(mountpoint).mountpoint)
    return None


def _print_stat(arguments: argparse.Namespace, mountpoint: Path) -> None:
    from tmemfs.cli import control_io, view

    if arguments.json:
        view.print_json(mountpoint)
    elif arguments.raw:
        print(control_io.read_in_time(mountpoint, "stat"), end="")
    elif arguments.output is not None:
        view.print_columns(mountpoint, arguments.output.split(","), arguments.bytes, not arguments.noheadings)
    else:
        view.print_stat(mountpoint, arguments.bytes, not arguments.noheadings)


def shrink(arguments: argparse.Namespace) -> int:
    """Free RAM of the pool."""
    from tmemfs.cli import view

    return view.shrink(arguments.mountpoint, arguments.size, _seconds(arguments.deadline), arguments.raw)


def compact(arguments: argparse.Namespace) -> int:
    """Merge sparse segments."""
    from tmemfs.cli import view

    return view.compact(arguments.mountpoint, arguments.factor, _seconds(arguments.deadline), arguments.raw)


def _seconds(text: str | None) -> float | None:
    from tmemfs.units import parse_seconds

    return None if text is None else parse_seconds(text)


def get(arguments: argparse.Namespace) -> int:
    """Print one control file, or all that hold one value."""
    from tmemfs.cli.control_io import read_control
    from tmemfs.cli.view import print_settings

    if arguments.key is None:
        print_settings(arguments.mountpoint)
    else:
        print(read_control(arguments.mountpoint, arguments.key), end="")
    return 0


def set_(arguments: argparse.Namespace) -> int:
    """Write one control file."""
    from tmemfs.cli.control_io import write_control

    key, value = arguments.key, arguments.value
    if value is None:
        key, equals, value = key.partition("=")
        if not equals:
            raise BadValue(f"{key!r} sets nothing: write for example 'tmemfs set pool.max 2G'")
    write_control(arguments.mountpoint, key, value)
    return 0


def demo(arguments: argparse.Namespace) -> int:
    """Store, shrink and verify real memory pages without a mount."""
    from tmemfs.cli.demo import run
    from tmemfs.cli.start import swap_bytes
    from tmemfs.store.codec import parse_codec

    run(swap_bytes(arguments.size), parse_codec(arguments.codec), arguments.directory)
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Print what the machine has of what tmemfs needs, 1 if something essential is missing; or acknowledge damage."""
    if arguments.acknowledge is not None:
        return _acknowledge(arguments.acknowledge)
    from tmemfs.cli.doctor import examine

    # a failure of a check is a finding, not an error of the command
    words = {True: "ok", False: "FAILS", None: "limited"}
    checks = examine(arguments.backing, _backing_refused(arguments.backing), _not_compiled())
    for check in checks:
        print(f"{check.name:22} {words[check.ok]:8} {check.found}" + (f"\n{'':31} -> {check.advice}" if check.advice else ""))
    return 1 if any(check.ok is False for check in checks) else 0


def _acknowledge(mountpoint: Path) -> int:
    from tmemfs.cli.control_io import read_control, write_control
    from tmemfs.control_files import ACKNOWLEDGE

    before = read_control(mountpoint, "damage")
    write_control(mountpoint, "damage", ACKNOWLEDGE)
    print(f"{mountpoint}: acknowledged\n{before}", end="")
    return 0


def _backing_refused(path: Path) -> str:
    """Why `path` cannot be the backing; nothing if it can, or if a daemon uses it."""
    from tmemfs.tiers.file import check_backing

    # an ordinary user may not look there, which says nothing about what root can do
    if os.geteuid():
        return ""
    with suppress(Busy):
        try:
            check_backing(path)
        except Refused as error:
            # `up` creates the default directory
            return "" if path == defaults.BACKING and not path.parent.exists() else str(error)
    return ""


def _not_compiled() -> str:
    """Why the store's compiled functions are not used; nothing if they are."""
    try:
        from tmemfs.store.native import WHY_NOT
    except ImportError as error:
        return str(error)
    return WHY_NOT
