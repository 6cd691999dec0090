"""The command: arguments in, tables out. Thin: what it does to the machine is in system/, what it says to a daemon goes through
the mount's control files. Imports nothing heavy before it knows what is wanted.

Exit codes: 0 done; 1 done, but not all (a shrink fell short, doctor found something essential missing); 2 refused, nothing
changed; 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeAlias

from tmemfs import __version__
from tmemfs.cli import usage
from tmemfs.errors import BadValue, Busy, FellShort, Refused, TmemfsError
from tmemfs.system.memory import total_ram_bytes
from tmemfs.units import PAGE_BYTES, parse_size

MOUNTPOINT: Final = Path("/run/tmemfs")
BACKING: Final = Path("/var/lib/tmemfs/backing")
LOG: Final = Path("/var/log/tmemfs.log")

_Commands: TypeAlias = "argparse._SubParsersAction[usage.Parser]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code."""
    _print_any_name()
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        run: Callable[[argparse.Namespace], int] = arguments.run
        code = run(arguments)
        sys.stdout.flush()  # here, where an error can still be said
        return code
    except TmemfsError as error:
        return _failed(str(error), 1 if isinstance(error, FellShort) else 2)
    except BrokenPipeError:
        with suppress(OSError):  # or the interpreter flushes again at its end, and complains
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError) as error:
        return _failed(f"the system refused something ({error}): see 'tmemfs doctor'", 2)
    except KeyboardInterrupt:
        return 130


def _failed(message: str, code: int) -> int:
    print(f"tmemfs: {usage.one_line(message)}", file=sys.stderr)
    return code


def _print_any_name() -> None:
    """A path need not be UTF-8: print its bytes as they are."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments, `mountpoint` being the one given in either way. Raises BadValue."""
    parser, commands = _parser()
    arguments = usage.parse(parser, commands, list(words))
    if "mountpoint_option" in arguments:
        given = {arguments.mountpoint_option, getattr(arguments, "mountpoint", None)} - {None}
        if len(given) > 1:
            raise BadValue("two mountpoints are given: give one, as an argument or as --mountpoint")
        arguments.mountpoint = given.pop() if given else MOUNTPOINT
    return arguments


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of the commands."""
    parser = usage.Parser(prog="tmemfs", description="Compressed swap that gives memory back: RAM first, then disk.")
    parser.add_argument("--version", action="version", version=f"tmemfs {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_mount_commands(commands)
    _add_control_commands(commands)
    _add_other_commands(commands)
    return parser, dict(commands.choices)


def _add_mount_commands(commands: _Commands) -> None:
    up = _command(commands, "up", _up, "mount, attach a loop device and turn the swap on")
    _add_mount_options(up)
    up.add_argument("--priority", type=usage.priority, default=100, help="swap priority (100); lower ones are filled after it")
    down = _command(commands, "down", _down, "swap off, detach and unmount, or clean up after a crash")
    down.add_argument("--force", action="store_true", help="even if RAM may not take the pages back")
    mount = _command(commands, "mount", _mount, "mount the file system only")
    _add_mount_options(mount)
    mount.add_argument("--foreground", action="store_true", help="stay in front, for a supervisor; log to stderr")
    _command(commands, "umount", _umount, "unmount, if nobody uses the image")


def _add_control_commands(commands: _Commands) -> None:
    stat = _command(commands, "stat", _stat, "show what the pool holds and has done")
    form = stat.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="every figure as JSON")
    form.add_argument("--raw", action="store_true", help="every figure, 'key value' a line")
    form.add_argument("--output", metavar="COLS", help="these figures in a row, separated by commas")
    stat.add_argument("--bytes", action="store_true", help="sizes in bytes")
    stat.add_argument("--noheadings", action="store_true", help="no line of headings")
    shrink = _command(commands, "shrink", _shrink, "free pool RAM, writing pages to disk compressed")
    shrink.add_argument("size", metavar="SIZE", help="bytes, K/M/G/T, or all")
    shrink.add_argument("--deadline", metavar="S", help="give up after this many seconds")
    compact = _command(commands, "compact", _compact, "merge sparse segments, in RAM and on disk")
    compact.add_argument("factor", metavar="FACTOR", nargs="?", default="1.10", help="bytes occupied by live byte to reach (1.10)")
    compact.add_argument("--deadline", metavar="S", help="give up after this many seconds")
    for command in (shrink, compact):
        command.add_argument("--raw", action="store_true", help="the answer as 'key value' lines, also on a terminal")
    get = _command(commands, "get", _get, "read a control file, or all that hold one value")
    get.add_argument("key", metavar="KEY", nargs="?", help="its name (all of them, 'key value' a line)")
    set_ = _command(commands, "set", _set, "write a control file: set KEY VALUE, or KEY=VALUE")
    set_.add_argument("key", metavar="KEY", help="its name, or KEY=VALUE")
    set_.add_argument("value", metavar="VALUE", nargs="?", help="what to write")


def _add_other_commands(commands: _Commands) -> None:
    demo = commands.add_parser("demo", help="the store alone, on real memory pages; needs neither root nor FUSE")
    demo.add_argument("--size", default="256M", help="pages to store (256M)")
    demo.add_argument("--codec", default="lz4", help="lz4, zstd, zstd:LEVEL or none")
    demo.add_argument("--directory", type=_place, default=Path("/var/tmp"), help="where its backing file goes (/var/tmp)")
    demo.set_defaults(run=_demo)
    doctor = commands.add_parser("doctor", help="what this machine has of what tmemfs needs")
    doctor.add_argument("--backing", type=_place, default=BACKING, help=f"where the backing would be ({BACKING})")
    doctor.set_defaults(run=_doctor)


def _command(commands: _Commands, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    """A command on a mount: all take --mountpoint, those without an argument of their own also the mountpoint alone."""
    command = commands.add_parser(name, help=text, description=text)
    command.register("action", None, _Given)
    if name not in ("shrink", "compact", "get", "set"):
        command.add_argument("mountpoint", nargs="?", type=_place, metavar="MOUNTPOINT", help=f"where it is ({MOUNTPOINT})")
    command.add_argument(
        "--mountpoint", dest="mountpoint_option", type=_place, metavar="MOUNTPOINT", help=f"where it is ({MOUNTPOINT})"
    )
    command.set_defaults(run=run, given={})
    return command


class _Given(argparse._StoreAction):
    """Stores a value, and its text in `given`: what was given and what is assumed are told apart so."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:  # fmt: skip
        super().__call__(parser, namespace, values, option_string)
        namespace.given = {**getattr(namespace, "given", {}), self.dest: str(values)}


def _place(text: str) -> Path:
    """A path, made absolute at once: a daemon works in another directory."""
    try:
        return Path(usage.not_empty(text)).absolute()
    except FileNotFoundError:
        raise argparse.ArgumentTypeError(f"{text}: the current directory has gone: give a path that begins with /") from None


def _backing(text: str) -> str:
    return text if text == "none" else os.fspath(_place(text))


def _add_mount_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--size", help="logical size of the swap (twice RAM)")
    command.add_argument("--pool-max", default="25%", help="most RAM for the pool: a size, N%% or max (25%%)")
    command.add_argument(
        "--backing", type=_backing, default=str(BACKING), help=f"file or block device to shrink to, or none ({BACKING})"
    )
    command.add_argument("--backing-max", default="max", help="most disk: a size, N%% of what is free there, or max")
    command.add_argument("--codec", default="lz4", help="lz4, zstd, zstd:LEVEL or none (lz4)")
    command.add_argument("--datapath", choices=("relay", "pyfuse3"), default="relay", help="who serves the pages (relay)")
    command.add_argument("--kernel-tuning", choices=("auto", "off"), default="auto",
                         help="change the kernel's settings while the swap is on (auto)")  # fmt: skip
    command.add_argument("--log", type=_place, default=LOG, help=f"the daemon's log ({LOG})")


def _swap_bytes(text: str | None) -> int:
    if text is None:
        return total_ram_bytes() * 2 // PAGE_BYTES * PAGE_BYTES
    size = parse_size(text) if not text.startswith("-") else -1
    if size <= 0 or size % PAGE_BYTES:
        raise BadValue(f"--size {text} is not a positive multiple of the page ({PAGE_BYTES}): give for example 8G")
    return size


def _serve(arguments: argparse.Namespace) -> Callable[[Callable[[], None]], None]:
    """What runs the daemon with these arguments; imports it only when called, in the process that will be it."""
    size = _swap_bytes(arguments.size)
    names = ("pool_max", "backing", "backing_max", "codec", "datapath", "kernel_tuning", "log")
    values = {"size": str(size)} | {name.replace("_", "-"): str(getattr(arguments, name)) for name in names}

    def serve(ready: Callable[[], None]) -> None:
        from tmemfs import daemon
        from tmemfs.system import own_mount, runtime
        from tmemfs.system.swapdev import resolved

        recorded: list[runtime.Record] = []

        def answers() -> None:
            recorded.append(own_mount.record_of(arguments.mountpoint, __version__, values))
            runtime.write_record(recorded[0])
            ready()

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
        options = daemon.Options(
            mountpoint=resolved(arguments.mountpoint),
            swap_bytes=size,
            pool_max=arguments.pool_max,
            backing=None if arguments.backing == "none" else Path(arguments.backing),
            backing_max=arguments.backing_max,
            codec=arguments.codec,
            datapath=arguments.datapath,
            log=None if getattr(arguments, "foreground", False) else arguments.log,
            kernel_tuning=arguments.kernel_tuning,
        )
        with _default_places(arguments):
            daemon.serve(options, answers)
        for record in recorded:  # it was unmounted, by whatever command; after a failure there may be a loop device still
            own_mount.forget(record)

    return serve


@contextmanager
def _default_places(arguments: argparse.Namespace) -> Iterator[None]:
    """The directories that were not given but assumed, created; gone again if it comes to nothing. Given ones have to be there."""
    assumed = [MOUNTPOINT] if arguments.mountpoint == MOUNTPOINT else []
    assumed += [BACKING.parent] if arguments.backing == str(BACKING) else []
    created = [place for place in assumed if _make_directory(place)]
    try:
        yield
    except BaseException:
        for place in created:
            with suppress(OSError):
                place.rmdir()
        raise


def _make_directory(place: Path) -> bool:
    """Whether `place` had to be created. Raises Refused."""
    try:
        place.mkdir(parents=True, mode=0o700)
    except FileExistsError:
        return False
    except OSError as error:
        raise Refused(f"cannot create {place} ({error.strerror}): give another mountpoint or --backing") from error
    return True


def _up(arguments: argparse.Namespace) -> int:
    from tmemfs.cli import lifecycle
    from tmemfs.cli.differences import refuse_differences
    from tmemfs.cli.view import print_stat, print_what_next
    from tmemfs.system.capabilities import require_root

    serve = _serve(arguments)
    require_root()
    given = {name.replace("_", "-"): text for name, text in arguments.given.items() if not name.startswith("mountpoint")}
    with lifecycle.of(arguments.mountpoint, "up") as target:
        done = lifecycle.up(target, arguments.priority, lambda: refuse_differences(target, given), lambda: _start(arguments, serve))
        print(f"{target.mountpoint}: {done}")
        print_stat(target.mountpoint)
    print_what_next(target.mountpoint)
    return 0


def _down(arguments: argparse.Namespace) -> int:
    from tmemfs.cli import lifecycle
    from tmemfs.cli.view import Bar
    from tmemfs.system.capabilities import require_root

    require_root()
    with lifecycle.of(arguments.mountpoint, "down") as target, Bar("swapping in") as bar:
        print(f"{target.mountpoint}: {lifecycle.down(target, arguments.force, bar.left)}")
    _restore_kernel_settings()
    return 0


def _restore_kernel_settings() -> None:
    """What daemons left changed that were killed. Raises Refused, Busy."""
    from tmemfs.system.kernel_settings import KernelSettings

    try:
        with closing(KernelSettings()) as settings:
            settings.restore_leftovers()
    except OSError as error:
        raise Refused(f"kernel settings may stay changed ({error}): see tmemfs doctor") from error


def _mount(arguments: argparse.Namespace) -> int:
    from tmemfs.cli import lifecycle
    from tmemfs.system import background
    from tmemfs.system.capabilities import require_root

    serve = _serve(arguments)
    require_root()
    if arguments.foreground:
        background.open_standard_descriptors()
        background.close_inherited()
    with ExitStack() as until_it_answers:
        target = until_it_answers.enter_context(lifecycle.of(arguments.mountpoint, "mount"))
        lifecycle.refuse_taken(target)
        if arguments.foreground:
            serve(until_it_answers.close)
        else:
            _start(arguments, serve)
            print(f"{target.mountpoint}: mounted")
    return 0


def _start(arguments: argparse.Namespace, serve: Callable[[Callable[[], None]], None]) -> None:
    """Start a daemon in the background; returns when its mount answers."""
    from tmemfs.system.background import run_in_background

    run_in_background(serve, arguments.log)


def _umount(arguments: argparse.Namespace) -> int:
    from tmemfs.cli import lifecycle
    from tmemfs.system.capabilities import require_root

    require_root()
    with lifecycle.of(arguments.mountpoint, "umount") as target:
        lifecycle.umount(target)
        print(f"{target.mountpoint}: unmounted")
    return 0


def _stat(arguments: argparse.Namespace) -> int:
    from tmemfs.cli import lifecycle, view

    mountpoint = lifecycle.readable_at(arguments.mountpoint)
    if arguments.json:
        view.print_json(mountpoint)
    elif arguments.raw:
        print(view.read_control(mountpoint, "stat"), end="")
    elif arguments.output is not None:
        view.print_columns(mountpoint, arguments.output.split(","), arguments.bytes, not arguments.noheadings)
    else:
        view.print_stat(mountpoint, arguments.bytes, not arguments.noheadings)
    return 0


def _shrink(arguments: argparse.Namespace) -> int:
    from tmemfs.cli.view import shrink
    from tmemfs.units import parse_seconds

    seconds = None if arguments.deadline is None else parse_seconds(arguments.deadline)
    return shrink(arguments.mountpoint, arguments.size, seconds, arguments.raw)


def _compact(arguments: argparse.Namespace) -> int:
    from tmemfs.cli.view import compact
    from tmemfs.units import parse_seconds

    seconds = None if arguments.deadline is None else parse_seconds(arguments.deadline)
    return compact(arguments.mountpoint, arguments.factor, seconds, arguments.raw)


def _get(arguments: argparse.Namespace) -> int:
    from tmemfs.cli.view import print_settings, read_control

    if arguments.key is None:
        print_settings(arguments.mountpoint)
    else:
        print(read_control(arguments.mountpoint, arguments.key), end="")
    return 0


def _set(arguments: argparse.Namespace) -> int:
    from tmemfs.cli.view import write_control

    key, value = arguments.key, arguments.value
    if value is None:
        key, equals, value = key.partition("=")
        if not equals:
            raise BadValue(f"{key!r} sets nothing: write for example 'tmemfs set pool.max 2G'")
    write_control(arguments.mountpoint, key, value)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from tmemfs.cli.demo import run
    from tmemfs.store.codec import parse_codec

    run(_swap_bytes(arguments.size), parse_codec(arguments.codec), arguments.directory)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from tmemfs.cli.doctor import examine

    words = {True: "ok", False: "FAILS", None: "limited"}
    checks = examine(arguments.backing, _backing_refused(arguments.backing), _not_compiled())
    for check in checks:
        print(f"{check.name:22} {words[check.ok]:8} {check.found}" + (f"\n{'':31} -> {check.advice}" if check.advice else ""))
    return 1 if any(check.ok is False for check in checks) else 0


def _backing_refused(path: Path) -> str:
    """Why `path` cannot be the backing; nothing if it can, or is one that is in use."""
    from tmemfs.tiers.file import check_backing

    if os.geteuid():  # another user may not look there
        return ""
    with suppress(Busy):
        try:
            check_backing(path)
        except Refused as error:
            return "" if path == BACKING and not path.parent.exists() else str(error)
    return ""


def _not_compiled() -> str:
    """Why the store's compiled functions are not used."""
    try:
        from tmemfs.store.native import WHY_NOT
    except ImportError as error:
        return str(error)
    return WHY_NOT
