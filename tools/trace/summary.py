"""Figures of a trace: counts, slots, duration, loads and reloads. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from tmemfs.units import PAGE_BYTES
from tools.trace.format import LOAD, STORE, Request


@dataclass(slots=True)
class Summary:
    """Pages per operation; `reloads` are loads of a page that was already loaded since it was stored."""

    seconds: float = 0.0
    requests: int = 0
    stores: int = 0
    loads: int = 0
    discards: int = 0
    slots_stored: int = 0
    zero_pages: int = 0
    stored_bytes: int = 0
    loaded_pages: int = 0
    reloads: int = 0

    @property
    def load_share(self) -> float:
        """Loads as a share of stores and loads."""
        return self.loads / max(self.loads + self.stores, 1)

    @property
    def reload_share(self) -> float:
        """Reloads as a share of the loads of stored pages."""
        return self.reloads / max(self.reloads + self.loaded_pages, 1)

    @property
    def ratio(self) -> float:
        """Bytes of pages per byte of payload."""
        return self.stores * PAGE_BYTES / max(self.stored_bytes, 1)

    def __str__(self) -> str:
        figures = [(entry.name, getattr(self, entry.name)) for entry in fields(self)]
        figures += [(name, getattr(self, name)) for name in ("load_share", "reload_share", "ratio")]
        return "\n".join(
            f"{name:13} {figure:.2f}" if isinstance(figure, float) else f"{name:13} {figure}" for name, figure in figures
        )


def summary(requests: Iterable[Request]) -> Summary:
    """Sum up `requests`."""
    sums = Summary()
    loaded: dict[int, bool] = {}  # slots that hold a page: whether it was loaded
    ever: set[int] = set()
    for request in requests:
        sums.requests += 1
        sums.seconds = request.at_us / 1e6
        slots = range(request.first, request.first + request.count)
        if request.operation == STORE:
            _sum_store(sums, request)
            loaded.update(dict.fromkeys(slots, False))
            ever.update(slots)
        elif request.operation == LOAD:
            _sum_load(sums, slots, loaded)
        else:
            sums.discards += request.count
            for slot in slots:
                loaded.pop(slot, None)
    sums.slots_stored = len(ever)
    return sums


def _sum_store(sums: Summary, request: Request) -> None:
    sums.stores += request.count
    sums.zero_pages += request.payloads.count(0)
    sums.stored_bytes += sum(request.payloads)


def _sum_load(sums: Summary, slots: range, loaded: dict[int, bool]) -> None:
    sums.loads += len(slots)
    for slot in slots:
        if slot in loaded:
            sums.reloads += loaded[slot]
            sums.loaded_pages += not loaded[slot]
            loaded[slot] = True
