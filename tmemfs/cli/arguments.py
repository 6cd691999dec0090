"""The arguments of the command: its parser, and which function of commands.py runs each command."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tmemfs import __version__
from tmemfs.cli import commands, defaults, usage
from tmemfs.errors import BadValue

_Subparsers: TypeAlias = "argparse._SubParsersAction[usage.Parser]"


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments in `words`; `run` is the function of the command, `mountpoint` the one given in either way. Raises BadValue."""
    parser, subparsers = _parser()
    arguments = usage.parse(parser, subparsers, list(words))
    if "mountpoint_option" in arguments:
        # the same mountpoint given twice is no contradiction
        given = {arguments.mountpoint_option, getattr(arguments, "mountpoint", None)} - {None}
        if len(given) > 1:
            raise BadValue("two mountpoints are given: give one, as an argument or as --mountpoint")
        arguments.mountpoint = given.pop() if given else defaults.MOUNTPOINT
    return arguments


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of the commands."""
    parser = usage.Parser(prog="tmemfs", description="Compressed swap that gives memory back: RAM first, then disk.")
    parser.add_argument("--version", action="version", version=f"tmemfs {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_mount_commands(subparsers)
    _add_control_commands(subparsers)
    _add_other_commands(subparsers)
    return parser, dict(subparsers.choices)


def _add_mount_commands(subparsers: _Subparsers) -> None:
    up = _command(subparsers, "up", commands.up, "mount, attach a loop device and turn the swap on")
    _add_mount_options(up)
    up.add_argument(
        "--priority", type=usage.priority, default=100, help="swap priority (100); swaps of lower priority are filled after it"
    )
    down = _command(subparsers, "down", commands.down, "swap off, detach and unmount, or clean up after a crash")
    down.add_argument("--force", action="store_true", help="even if RAM may be too small for the pages")
    mount = _command(subparsers, "mount", commands.mount, "mount the file system only")
    _add_mount_options(mount)
    mount.add_argument("--foreground", action="store_true", help="stay in the foreground, for a service manager; log to stderr")
    _command(subparsers, "umount", commands.umount, "unmount, if nobody uses the image")
    _command(subparsers, "upgrade", commands.upgrade, "have this version take over from the one that serves, with the swap on")


def _add_control_commands(subparsers: _Subparsers) -> None:
    stat = _command(subparsers, "stat", commands.stat, "show what the pool holds and has done")
    form = stat.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="every figure as JSON")
    form.add_argument("--raw", action="store_true", help="every figure as 'key value' lines")
    form.add_argument("--output", metavar="COLS", help="these figures in a row, separated by commas")
    stat.add_argument("--bytes", action="store_true", help="sizes in bytes")
    stat.add_argument("--noheadings", action="store_true", help="no line of headings")
    shrink = _command(subparsers, "shrink", commands.shrink, "free pool RAM, writing pages to disk compressed")
    shrink.add_argument("size", metavar="SIZE", help="bytes, K/M/G/T, or all")
    shrink.add_argument("--deadline", metavar="S", help="give up after this many seconds")
    compact = _command(subparsers, "compact", commands.compact, "merge sparse segments, in RAM and on disk")
    compact.add_argument("factor", metavar="FACTOR", nargs="?", default="1.10", help="bytes occupied per live byte to reach (1.10)")
    compact.add_argument("--deadline", metavar="S", help="give up after this many seconds")
    for command in (shrink, compact):
        command.add_argument("--raw", action="store_true", help="the answer as 'key value' lines, also on a terminal")
    get = _command(subparsers, "get", commands.get, "read a control file, or all that hold one value")
    get.add_argument("key", metavar="KEY", nargs="?", help="its name (without it all, as 'key value' lines)")
    set_ = _command(subparsers, "set", commands.set_, "write a control file: set KEY VALUE, or KEY=VALUE")
    set_.add_argument("key", metavar="KEY", help="its name, or KEY=VALUE")
    set_.add_argument("value", metavar="VALUE", nargs="?", help="what to write")


def _add_other_commands(subparsers: _Subparsers) -> None:
    demo = subparsers.add_parser("demo", help="the store alone, on real memory pages; needs neither root nor FUSE")
    demo.add_argument("--size", default="256M", help="pages to store (256M)")
    demo.add_argument("--codec", default="lz4", help="lz4, zstd, zstd:LEVEL or none")
    demo.add_argument("--directory", type=_path, default=Path("/var/tmp"), help="where its backing file goes (/var/tmp)")
    demo.set_defaults(run=commands.demo)
    doctor = subparsers.add_parser("doctor", help="what this machine has of what tmemfs needs")
    doctor.add_argument("--backing", type=_path, default=defaults.BACKING, help=f"where the backing would be ({defaults.BACKING})")
    doctor.add_argument("--acknowledge", nargs="?", type=_path, const=defaults.MOUNTPOINT, metavar="MOUNTPOINT",
                        help=f"take note of the damage that this mount reports ({defaults.MOUNTPOINT})")  # fmt: skip
    doctor.set_defaults(run=commands.doctor)


def _command(subparsers: _Subparsers, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    """Add a command on a mount. All take --mountpoint; those without an argument of their own also take MOUNTPOINT."""
    command = subparsers.add_parser(name, help=text, description=text)
    # None is the action of an argument that names none
    command.register("action", None, _Given)
    # the others have an argument of their own, which a mountpoint before it would be taken for
    if name not in ("shrink", "compact", "get", "set"):
        command.add_argument("mountpoint", nargs="?", type=_path, metavar="MOUNTPOINT", help=f"where it is ({defaults.MOUNTPOINT})")
    command.add_argument(
        "--mountpoint", dest="mountpoint_option", type=_path, metavar="MOUNTPOINT", help=f"where it is ({defaults.MOUNTPOINT})"
    )
    command.set_defaults(run=run, given={})
    return command


class _Given(argparse._StoreAction):
    """Stores a value, and its text in `given`, so that a second `up` can compare only the options that were given."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:  # fmt: skip
        super().__call__(parser, namespace, values, option_string)
        namespace.given = {**getattr(namespace, "given", {}), self.dest: str(values)}


def _path(text: str) -> Path:
    """The absolute path: a daemon works in another directory."""
    try:
        return Path(usage.not_empty(text)).absolute()
    except FileNotFoundError:
        raise argparse.ArgumentTypeError(f"{text}: the current directory has gone: give a path that begins with /") from None


def _backing_path(text: str) -> str:
    return text if text == "none" else os.fspath(_path(text))


def _add_mount_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--size", help="logical size of the swap (twice RAM)")
    command.add_argument("--pool-max", default="25%", help="most RAM for the pool: a size, N%% or max (25%%)")
    command.add_argument(
        "--backing",
        type=_backing_path,
        default=str(defaults.BACKING),
        help=f"file or block device to shrink to, or none ({defaults.BACKING})",
    )
    command.add_argument("--backing-max", default="max", help="most disk: a size, N%% of what is free there, or max")
    command.add_argument("--codec", default="lz4", help="lz4, zstd, zstd:LEVEL or none (lz4)")
    command.add_argument("--kernel-tuning", choices=("auto", "off"), default="auto",
                         help="change the kernel's settings while the swap is on (auto)")  # fmt: skip
    command.add_argument("--latency", choices=("auto", "off", "always"), default="auto",
                         help="keep idle CPUs awake while pages are swapped in bursts, never, or always (auto)")  # fmt: skip
    command.add_argument("--encrypt", choices=("on", "off"), default="on",
                         help="encrypt what goes to the backing, with a key that only this daemon has (on)")  # fmt: skip
    command.add_argument("--watchdog", default="30", metavar="S|off",
                         help="replace a worker that answers no request for so many seconds (30)")  # fmt: skip
    command.add_argument("--log", type=_path, default=defaults.LOG, help=f"the daemon's log ({defaults.LOG})")
