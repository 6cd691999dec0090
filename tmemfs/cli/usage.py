"""How the words of a command line are parsed, and the messages about words that are not understood.

Each message is one line, and names the nearest word that is known. Knows nothing of what the commands do. Standard library only, so
that `down` works where nothing else is installed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Final, NoReturn

from tmemfs.errors import BadValue

#: A longer message keeps its beginning, which says what is wrong, and its end, which says what to do.
_LONGEST_MESSAGE: Final = 600
_PRIORITY: Final = re.compile(r"-?[0-9]{1,6}")
#: The range of swapon(8); -1 lets the kernel choose.
_PRIORITIES: Final = range(-1, 32768)


class Parser(argparse.ArgumentParser):
    """argparse, except that errors are raised as BadValue instead of being printed below a usage of ten lines."""

    def error(self, message: str) -> NoReturn:
        """Raise BadValue with the next step."""
        raise BadValue(f"{message}: see '{self.prog} --help'")


def parse(
    parser: argparse.ArgumentParser, commands: dict[str, argparse.ArgumentParser], words: Sequence[str]
) -> argparse.Namespace:
    """The arguments in `words`. Raises BadValue; for an unknown command or option it names the nearest known one."""
    # argparse would list all eleven commands
    if words and not words[0].startswith("-") and words[0] not in commands:
        raise BadValue(f"no command {words[0]!r}{suggestion(words[0], commands)}: see '{parser.prog} --help'")
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        command = commands[words[0]]
        options = [option for action in command._actions for option in action.option_strings]
        word = unknown[0].partition("=")[0]
        said = f"no option {word!r}{suggestion(word, options)}" if word.startswith("-") else f"no use for {word!r}"
        raise BadValue(f"{said}: see '{command.prog} --help'")
    empty = next((name for name, value in vars(arguments).items() if value == []), None)
    # argparse parses '--size=--' as a list without a value
    if empty:
        raise BadValue(f"argument --{empty}: expected one argument: see '{commands[words[0]].prog} --help'")
    return arguments


def suggestion(word: str, known: Iterable[str]) -> str:
    """', did you mean X?' for the nearest of `known`, or nothing if none is near."""
    # imported only for a wrong word: the daemon keeps in RAM what the command has imported
    from difflib import get_close_matches

    near = get_close_matches(word[:100], list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def one_line(message: str) -> str:
    """`message` as one printable line: other characters are escaped, and a long one loses its middle."""
    # names come from users and file systems: a control sequence in one must not reach the terminal
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    half = _LONGEST_MESSAGE // 2
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"


def not_empty(text: str) -> str:
    """`text`, if it can be a path. Raises ArgumentTypeError."""
    # pathlib takes an empty path, usually an unset variable in a script, for the current directory
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path")
    return text


def priority(text: str) -> int:
    """The swap priority in `text`. Raises ArgumentTypeError."""
    if not _PRIORITY.fullmatch(text) or int(text) not in _PRIORITIES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a swap priority (-1 to 32767)")
    return int(text)
