"""docs/control.md, from the table of control files and the registry of metrics: `make docs` writes what this prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tmemfs.control_files import FILES
from tmemfs.observe.metric import Metric, Output
from tmemfs.observe.prometheus import name_of
from tmemfs.observe.registry import SECTIONS, shown_in

_FILES = """\
# The control directory

Made from `tmemfs/control_files.py` and `tmemfs/observe/registry.py` by `make docs`; do not edit. A setting holds one value,
with a newline at the end. Reports have forms of their own.

| file | mode | unit | meaning |
|---|---|---|---|
"""
_STAT = """
## stat

Lines of `key value`. `tmemfs stat --raw` and `tmemfs stat --json` show all of them, `tmemfs stat --output pool_current,codec`
chosen ones.

A gauge is a value of this moment, a counter a total since the start of the daemon, and an info a text. In the column of units, 1 is
a plain number, 0/1 is no or yes, and kB is 1024 bytes. A value is `-` where it does not apply now, and `max` where there is no
limit. Pages have 4096 bytes.
"""
_EVENTS = """
## events

Lines of `key value`. These should be rare.
"""
_ZRAM = """
## mm_stat, io_stat, bd_stat

One line of numbers each, in zram's order, so that tools which read zram's statistics can read these.
"""
_METRICS = """
## metrics

Every number of `stat` and `events` as Prometheus text. The name is `tmemfs_` and the key, with `_total` for a counter. In base
units: {renamed}.

`tmemfs_healthy` is 1 while `state` says `running`. {texts} are labels of `tmemfs_info`. A value that does not apply now is left
out. No limit is `+Inf`.
"""
_HEADINGS = "\n| key | kind | unit | meaning |\n|---|---|---|---|\n"


def document() -> str:
    """The text of docs/control.md."""
    parts = [_FILES, *_file_rows(), _STAT, *_sections("stat"), _EVENTS, *_sections("events"), _ZRAM, *_zram(), _metrics()]
    return "".join(parts)


def _file_rows() -> Iterator[str]:
    return (f"| `{file.name}` | {file.mode:04o} | {file.unit} | {file.help} |\n" for file in FILES)


def _sections(output: Output) -> Iterator[str]:
    for section in SECTIONS:
        shown = [metric for metric in section.metrics if output in metric.outputs]
        if shown:
            yield f"\n### {section.title}\n" if output == "stat" else ""
            yield _table(shown)


def _zram() -> Iterator[str]:
    files: tuple[Output, ...] = ("mm_stat", "io_stat", "bd_stat")
    for output in files:
        yield f"\n### {output}\n" + _table(shown_in(output))


def _table(metrics: Iterable[Metric]) -> str:
    return _HEADINGS + "".join(f"| `{m.name}` | {m.kind} | {m.unit} | {m.help} |\n" for m in metrics)


def _metrics() -> str:
    shown = list(shown_in("metrics"))
    renamed = [f"`{m.name}` is `{name_of(m)}`" for m in shown if not name_of(m).startswith(f"tmemfs_{m.name}")]
    texts = [f"`{m.name}`" for m in shown if m.kind == "info"]
    return _METRICS.format(renamed="; ".join(renamed), texts=" and ".join([", ".join(texts[:-1]), texts[-1]]))


if __name__ == "__main__":
    print(document(), end="")
