"""A strict reader of Prometheus text: the exposition format, and promtool's rules for names."""

from __future__ import annotations

import re
from typing import Final

_NAME: Final = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL: Final = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
_HELP: Final = re.compile(rf"# HELP ({_NAME}) ((?:[^\\\n]|\\[\\n])+)")
_TYPE: Final = re.compile(rf"# TYPE ({_NAME}) (counter|gauge)")
_SAMPLE: Final = re.compile(rf"({_NAME})(?:\{{({_LABEL}(?:,{_LABEL})*)\}})? ([+-]?(?:Inf|[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?))")
#: What promtool calls abbreviations of units and units that are not base units, and endings that other types have.
_NOT_BASE: Final = frozenset(
    ("ms", "us", "ns", "s", "sec", "kb", "mb", "kbytes", "mbytes", "milliseconds", "microseconds", "kilobytes")
)
_RESERVED: Final = ("_count", "_sum", "_bucket")


def families(text: str) -> dict[str, tuple[str, str]]:
    """Kind and value of every family in `text`, held strictly against the exposition format and promtool's rules for names."""
    assert text.endswith("\n") and "\r" not in text
    lines, found = text.splitlines(), dict[str, tuple[str, str]]()
    assert len(lines) % 3 == 0
    for at in range(0, len(lines), 3):
        said, typed, sample = _HELP.fullmatch(lines[at]), _TYPE.fullmatch(lines[at + 1]), _SAMPLE.fullmatch(lines[at + 2])
        assert said and typed and sample, lines[at : at + 3]
        name = sample[1]
        assert said[1] == typed[1] == name and name not in found
        assert (typed[2] == "counter") == name.endswith("_total")
        assert not name.endswith(_RESERVED) and not _NOT_BASE & set(name.split("_")), name
        labels = re.findall(r"(\w+)=", sample[2] or "")
        assert len(set(labels)) == len(labels)
        found[name] = (typed[2], sample[3])
    return found
