"""`python -m tools.corpus [--only NAME,...] [--pages N] [--output DIR] [--list]`: the swappable memory of real programs.

Starts one program after the other, lets it fill its memory, and copies up to N pages of it and its children, sampled evenly.
DIR/NAME.pages has those that are not zero, 4096 bytes each, one after the other. DIR/corpus.json has a line per source,
DIR/corpus.md the table that is printed. Sources that are captured in an earlier run only stay in both. Needs root. Leaves nothing
running, even when it is interrupted. The pages belong to this machine: do not commit them.

Exit codes: 0 done, without the sources whose program is missing; 1 a program failed; 2 refused, or every program is missing; 130 or
143 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Final

from tmemfs.errors import BadValue, Refused, TmemfsError
from tmemfs.store.codec import ZERO_PAGE
from tools.corpus.pages import capture
from tools.corpus.report import Row, as_json, figures, parse_json, report
from tools.corpus.sources import SOURCES, Source, locate, missing
from tools.corpus.stage import stage
from tools.interrupts import interruptible

_PAGES: Final = 16_384
_SEED: Final = 1


def main(words: list[str] | None = None) -> int:
    """Capture or list what is asked for."""
    a = _parser().parse_args(words)
    try:
        sources = chosen(a.only)
        left_out = {source.name: reason for source in sources if (reason := missing(source, locate))}
        if a.list:
            print("\n".join(f"{source.name:12} {left_out.get(source.name, 'can be captured')}" for source in sources))
            return 0
        if len(left_out) < len(sources):
            return _capture_all([source for source in sources if source.name not in left_out], left_out, a.pages, a.output)
        for name, reason in left_out.items():
            print(f"corpus: {name}: {reason}", file=sys.stderr)
    except (TmemfsError, OSError) as error:
        print(f"corpus: {error}", file=sys.stderr)
    return 2


def chosen(only: str | None) -> list[Source]:
    """The named sources, or all. Raises BadValue."""
    names = [source.name for source in SOURCES]
    wanted = names if only is None else only.split(",")
    if unknown := [name for name in wanted if name not in names]:
        raise BadValue(f"no such source: {', '.join(unknown)}; choose from {','.join(names)}")
    return [source for source in SOURCES if source.name in wanted]


def _capture_all(sources: list[Source], left_out: dict[str, str], most: int, output: Path) -> int:
    """Capture, write and print; returns the exit code."""
    if os.geteuid():
        raise Refused("the memory of other processes is for root only: run it with sudo")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{output} cannot be made a directory ({error.strerror}): choose another with --output") from error
    rows, failed = _kept(output), dict[str, str]()
    with interruptible("ending what was started"):
        for source in sources:
            began = time.monotonic()
            try:
                rows[source.name] = _captured(source, most, output)
            except (TmemfsError, OSError) as error:
                failed[source.name] = str(error)
            said = failed.get(source.name, f"{time.monotonic() - began:.1f} s")
            print(f"{source.name}: {said}", file=sys.stderr, flush=True)
            (output / "corpus.json").write_text(as_json(_ordered(rows)))
    text = report(_ordered(rows), left_out, failed)
    (output / "corpus.md").write_text(text)
    print(text)
    return 1 if failed else 0


def _captured(source: Source, most: int, output: Path) -> Row:
    """Capture one source and write its pages."""
    with stage() as there:
        got = capture(source.start(there).pid, most, _SEED)
    (output / f"{source.name}.pages").write_bytes(b"".join(page for page in got.pages if page != ZERO_PAGE))
    return Row(source.name, got.seen, got.shared, figures(got.pages))


def _kept(output: Path) -> dict[str, Row]:
    """The lines of an earlier run. Raises BadValue if the file is something else."""
    file = output / "corpus.json"
    try:
        return {row.name: row for row in parse_json(file.read_text())}
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise BadValue(f"{file} is not what this tool writes ({error}): remove it, or choose another --output") from error


def _ordered(rows: dict[str, Row]) -> list[Row]:
    return [rows[source.name] for source in SOURCES if source.name in rows]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAME,...", help="these sources, separated by commas")
    parser.add_argument("--pages", type=_count, default=_PAGES, help=f"at most this many per source ({_PAGES})")
    parser.add_argument(
        "--output", type=Path, default=Path("build/corpus"), help="where the pages and the report go (build/corpus)"
    )
    parser.add_argument("--list", action="store_true", help="capture nothing: list the sources, and what is missing for them")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of pages: give one from 1 on")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
