"""The captured pages per source: how many are zero or same-filled, and how well the rest compresses. Pure.

A page is encoded as in the store (tmemfs.store.codec). Its tag says whether it is a zero page, same-filled or raw. Ratios and
payloads are over the pages that a compressor gets, where a raw page counts as its 4096 bytes. Sources are never summed or averaged:
what a machine swaps is an unknown mixture of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any, Final

from tmemfs.store.codec import FILL, RAW, ZERO, encode, parse_codec
from tmemfs.units import PAGE_BYTES
from tools.bench.statistics import percentile

_LZ4: Final = parse_codec("lz4")
_ZSTD: Final = parse_codec("zstd:1")
_BOUND_PAGES: Final = 1024
_HEAD: Final = (
    "source", "pages seen", "of them shared", "sampled", "zero", "one word", "lz4 ratio", "zstd:1 ratio", "raw",
    "p10", "p50", "p90",
)  # fmt: skip
_NOTE: Final = f"""\
Pages of {PAGE_BYTES} bytes. Zero and one word: share of the sampled pages. The columns behind them are over the rest: bytes of
pages by bytes of payloads, the share stored raw by lz4, and the bytes of lz4's payloads at three percentiles. `random` and `zero`
are no programs but the bounds.
"""


@dataclass(frozen=True, slots=True)
class Figures:
    """Counts of pages; ratios and payload bytes are None if no page is left to compress."""

    pages: int
    zero: int
    one_word: int
    raw: int
    lz4_ratio: float | None = None
    zstd_ratio: float | None = None
    p10_bytes: int | None = None
    p50_bytes: int | None = None
    p90_bytes: int | None = None

    @property
    def rest(self) -> int:
        """The pages that a compressor gets."""
        return self.pages - self.zero - self.one_word


@dataclass(frozen=True, slots=True)
class Row:
    """A source: the pages `seen` in RAM, how many of them are shared memory, and the figures of a sample."""

    name: str
    seen: int
    shared: int
    figures: Figures

    @classmethod
    def parse(cls, kept: Mapping[str, Any]) -> Row:
        """The row that `as_json` wrote."""
        return cls(**{**kept, "figures": Figures(**kept["figures"])})


def figures(pages: Iterable[bytes]) -> Figures:
    """The figures of `pages`."""
    packed = [(page, *encode(page, _LZ4)) for page in pages]
    rest = [(page, tag, len(payload)) for page, tag, payload in packed if tag not in (ZERO, FILL)]
    tags = [tag for _, tag, _ in packed]
    counts = len(tags), tags.count(ZERO), tags.count(FILL), tags.count(RAW)
    if not rest:
        return Figures(*counts)
    sizes = sorted(size for _, _, size in rest)
    zstd_bytes = sum(len(encode(page, _ZSTD)[1]) for page, _, _ in rest)
    whole = len(rest) * PAGE_BYTES
    return Figures(*counts, whole / sum(sizes), whole / zstd_bytes, *(int(percentile(sizes, percent)) for percent in (10, 50, 90)))


def bounds() -> list[Row]:
    """The figures of pages that nothing compresses, and of zero pages."""
    random = Random(1)
    pages = {"random": [random.randbytes(PAGE_BYTES) for _ in range(_BOUND_PAGES)], "zero": [bytes(PAGE_BYTES)] * _BOUND_PAGES}
    return [Row(name, _BOUND_PAGES, 0, figures(some)) for name, some in pages.items()]


def table(rows: Iterable[Row]) -> str:
    """Markdown, a line per source."""
    lines = [_line(_HEAD), _line(["---", *["---:"] * (len(_HEAD) - 1)]), *(_line(_cells(row)) for row in rows)]
    return "\n".join(lines) + "\n"


def report(rows: Sequence[Row], left_out: Mapping[str, str], failed: Mapping[str, str]) -> str:
    """The table, and notes on what it means and what is left out."""
    parts = [table([*rows, *bounds()]), _NOTE]
    for head, reasons in (("Left out", left_out), ("Failed", failed)):
        if reasons:
            parts.append(f"{head}:\n\n" + "".join(f"- {name}: {reason}\n" for name, reason in reasons.items()))
    return "\n".join(parts)


def as_json(rows: Iterable[Row]) -> str:
    """A JSON array with a line per source."""
    return "[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n"


def parse_json(text: str) -> list[Row]:
    """The rows that `as_json` wrote. Raises ValueError for anything else."""
    try:
        return [Row.parse(kept) for kept in json.loads(text)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"no lines of a corpus: {error}") from error


def _cells(row: Row) -> list[str]:
    of = row.figures
    ratios = [f"{ratio:.2f}" if ratio else "-" for ratio in (of.lz4_ratio, of.zstd_ratio)]
    payloads = ["-" if size is None else str(size) for size in (of.p10_bytes, of.p50_bytes, of.p90_bytes)]
    counts = [f"{count:,}" for count in (row.seen, row.shared, of.pages)]
    return [
        row.name,
        *counts,
        _share(of.zero, of.pages),
        _share(of.one_word, of.pages),
        *ratios,
        _share(of.raw, of.rest),
        *payloads,
    ]


def _share(count: int, whole: int) -> str:
    return f"{count / whole:.1%}" if whole else "-"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
