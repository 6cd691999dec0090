"""The texts of the control files that report: stat, events, metrics, zram's three files, segments, and the last answers.

What the first six show is in the registry. Each text is made from one snapshot.
"""

from __future__ import annotations

import math

from tmemfs.observe.metric import Metric, Output, Value
from tmemfs.observe.prometheus import exposition
from tmemfs.observe.registry import shown_in
from tmemfs.observe.snapshot import Snapshot
from tmemfs.services import Services
from tmemfs.store.statistics import segment_lines
from tmemfs.units import SEGMENT_BYTES


def figures(services: Services, output: Output) -> list[tuple[Metric, Value]]:
    """The metrics of one control file, with their values now."""
    # one snapshot for the whole file: pages in RAM and on disk add up to those stored
    snapshot = Snapshot(services)
    return [(metric, metric.read(snapshot)) for metric in shown_in(output)]


def flat_keyed(services: Services, output: Output) -> str:
    """'key value' lines, as cgroup v2 has them."""
    return "".join(f"{metric.name} {_text(value)}\n" for metric, value in figures(services, output))


def zram(services: Services, output: Output) -> str:
    """Values in one line, in zram's order."""
    return " ".join(_text(value) for _, value in figures(services, output)) + "\n"


def prometheus(services: Services) -> str:
    """Every number of stat and events, and whether all is well."""
    return exposition(figures(services, "metrics"))


def _text(value: Value) -> str:
    """'max' for what has no limit, as cgroup v2 says it; '-' for what does not apply."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return "max" if math.isinf(value) else f"{value:.3f}"
    return str(value)


def shrink_answer(services: Services) -> str:
    """The last answer of control/shrink, flat keyed."""
    last = services.engine.shrinker.last
    if last is None:  # nothing was asked for yet: the same keys, so that a reader needs no second form
        return "requested 0\nfreed 0\nwritten 0\npages 0\nseconds 0\nreason -\n"
    requested = "all" if math.isinf(last.requested) else f"{last.requested:.0f}"
    return (
        f"requested {requested}\nfreed {last.freed}\nwritten {last.written}\npages {last.pages}\n"
        f"seconds {last.seconds:.6f}\nreason {last.reason or '-'}\n"
    )


def compact_answer(services: Services) -> str:
    """The last answer of control/compact, flat keyed."""
    last = services.engine.cleaner.last
    if last is None:  # as in shrink_answer
        return "requested 0\nbefore 0\nafter 0\nframes 0\nsegments 0\nwritten 0\nseconds 0\nreason -\n"
    return (
        f"requested {last.requested:.2f}\nbefore {last.before:.3f}\nafter {last.after:.3f}\nframes {last.frames}\n"
        f"segments {last.segments}\nwritten {last.written}\nseconds {last.seconds:.6f}\nreason {last.reason or '-'}\n"
    )


def damage(services: Services) -> str:
    """Damage that nobody has acknowledged, flat keyed."""
    found = services.engine.tmem.damage.since_acknowledged
    return f"damaged_in_ram {found.in_ram}\ndamaged_on_disk {found.on_tier}\nfailed_reads {found.failed_reads}\n"


def segments(services: Services) -> str:
    """segment state lane sequence fill% live% pages, a line each, oldest first."""
    return "".join(
        f"{s.segment} {s.state} {s.lane} {s.sequence} {100 * s.fill_bytes // SEGMENT_BYTES}% "
        f"{100 * s.live_bytes // SEGMENT_BYTES}% {s.pages}\n"
        for s in segment_lines(services.engine.tmem)
    )
