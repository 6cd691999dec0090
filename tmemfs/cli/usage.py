"""How the command understands its words, and how it says that it does not: one line, with the nearest word that it knows.

Knows nothing of what the commands do. Standard library only, so that `down` works where nothing else is installed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Final, NoReturn

from tmemfs.errors import BadValue

#: A message keeps its beginning, which says what is wrong, and its end, which says what to do.
_LONGEST_MESSAGE: Final = 600
_PRIORITY: Final = re.compile(r"-?[0-9]{1,6}")
#: What swapon(8) takes: -1 lets the kernel choose.
_PRIORITIES: Final = range(-1, 32768)


class Parser(argparse.ArgumentParser):
    """argparse, but what is wrong is raised as BadValue, not printed below a usage of ten lines."""

    def error(self, message: str) -> NoReturn:
        """Raise BadValue with the next step."""
        raise BadValue(f"{message}: see '{self.prog} --help'")


def parse(
    parser: argparse.ArgumentParser, commands: dict[str, argparse.ArgumentParser], words: Sequence[str]
) -> argparse.Namespace:
    """The arguments in `words`. Raises BadValue, for an unknown command or option with the nearest there is."""
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
    if empty:  # what argparse makes of '--size=--'
        raise BadValue(f"argument --{empty}: expected one argument: see '{commands[words[0]].prog} --help'")
    return arguments


def suggestion(word: str, known: Iterable[str]) -> str:
    """', did you mean X?' for the nearest of `known`, or nothing if none is near."""
    from difflib import get_close_matches  # only where a word is wrong: the daemon keeps in RAM what the command has imported

    near = get_close_matches(word[:100], list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def one_line(message: str) -> str:
    """`message` as one line that a terminal can show: what cannot be printed is escaped, the middle of a long one left out."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    half = _LONGEST_MESSAGE // 2
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"


def not_empty(text: str) -> str:
    """`text`: a path that is empty means the current directory by accident."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path")
    return text


def priority(text: str) -> int:
    """A swap priority."""
    if not _PRIORITY.fullmatch(text) or int(text) not in _PRIORITIES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a swap priority (-1 to 32767)")
    return int(text)
