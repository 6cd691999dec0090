"""The command: arguments in, tables out.

What it does to the machine is in system/. What it says to a daemon goes through the control files of the mount. A module is
imported when the command that needs it is known: `tmemfs down` works where nothing but the standard library is installed.

    arguments    the parser, and which function runs each command
    commands     one function per command
    start        how `up` and `mount` start a daemon
    targets      which mount a command is about
    health       what is known of its worker without asking it
    lifecycle    the steps of up, mount, down and umount
    upgrade      how this version is made to take over from the one that serves
    control_io   control files read and written through the mount
    view         what they say as tables, and requests with a progress bar
    differences  what a second `up` asks for against what runs
    doctor       what the machine has of what tmemfs needs
    checks       what one finding of the doctor is, and how the running daemons are
    demo         the store alone, without a mount
    real_pages   memory of a real process, for the demonstration
    usage        messages about words that are not understood
    defaults     where things are unless an option says otherwise

Exit codes: 0 done; 1 done in part (a shrink fell short, the doctor found something essential missing); 2 refused, nothing
changed; 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from tmemfs.cli import arguments, usage
from tmemfs.errors import FellShort, TmemfsError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    _print_any_name()
    try:
        given = arguments.parse(sys.argv[1:] if argv is None else argv)
        code: int = given.run(given)
        # the interpreter flushes at its end too, but an error would be printed as a traceback there
        sys.stdout.flush()
        return code
    except TmemfsError as error:
        return _failed(str(error), 1 if isinstance(error, FellShort) else 2)
    except BrokenPipeError:
        # the reader has all it wants; the null device takes what the interpreter still flushes at its end
        with suppress(OSError):
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
    """Have names that are not UTF-8 printed byte by byte."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
