"""What control/stat, events, metrics and zram's three files say: one reading of the services, in several forms.

Changes nothing. Keys are stable: tools read them. Figures are of now (pages, bytes) or since the start (counters).
"""

from __future__ import annotations

import math
import os
import time
from typing import Final

from tmemfs import __version__
from tmemfs.jobs.services import Services
from tmemfs.store.consistency import TmemStatistics, segment_lines
from tmemfs.store.native import IS_COMPILED
from tmemfs.store.segments import LANES
from tmemfs.system.kernel_settings import SHARES
from tmemfs.system.memory import Resident, resident_bytes
from tmemfs.units import BLOCK_BYTES, PAGE_BYTES, SEGMENT_BYTES

_COUNTERS: Final = frozenset(
    ("stores", "loads_ram", "loads_disk", "invalidates", "pages_written", "bytes_written", "bytes_released", "bytes_stored",
     "disk_reads", "disk_read_bytes", "requests", "deferred", "compactions", "compacted_records", "cleanings", "cleaned_segments",
     "cleaned_records", "cleaned_bytes", "recompressed_segments", "recompressed_records",
     "recompressed_saved_bytes", "recompressions_not_worth", "cleaner_pauses", "cleaner_paused_ms",
     "pressure_samples", "pressure_shrinks", "pressure_stalls", "pressure_strict", "pressure_swap_stalls")
)  # fmt: skip

#: While frames are released without a pause, no two readings agree. One takes 50 us.
_MOST_READINGS: Final = 8

Values = dict[str, int | float | str]


def stat(services: Services) -> Values:
    """Everything that is counted."""
    now, done, reads = services.statistics(), services.engine.shrinker.counts, services.engine.reader.counts
    resident, pool_resident = _resident(services)
    tmem = services.engine.tmem
    return {
        "version": __version__,
        "daemon_pid": os.getpid(),
        "datapath": services.datapath,
        "codec": services.engine.pager.codec.name,
        "compiled": int(IS_COMPILED),
        "swap_size": services.engine.pager.swap_bytes,
        "pages_stored": now.pages_stored,
        "pages_in_ram": now.pages_in_ram,
        "pages_on_disk": now.pages_on_disk,
        "zero_pages": now.zero_pages,
        "same_filled_pages": now.zero_pages + now.fill_pages,
        "incompressible_pages": now.raw_pages,
        "compressed_bytes": now.compressed_bytes,
        "pool_current": now.pool_current,
        "pool_used": now.pool_used,
        "pool_peak": now.pool_peak,
        "pool_max": services.limits.pool.max,
        "pool_resident": pool_resident,
        "backing_current": now.backing_current,
        "backing_max": services.limits.backing,
        "backing_discards": int(services.engine.tier.can_discard),
        "segments_in_ram": now.segments_in_ram,
        "segments_on_disk": now.segments_on_disk,
        "stores": now.stores,
        "loads_ram": now.loads_ram,
        "loads_disk": now.loads_disk,
        "invalidates": now.invalidates,
        "pages_written": done.pages,
        "bytes_written": done.written_bytes,
        "bytes_released": done.released_bytes,
        "bytes_stored": now.stored_bytes,
        "disk_reads": reads.reads,
        "disk_read_bytes": reads.read_bytes,
        **_density(services, now),
        **_pressure(services),
        **_tuning(services),
        "table_bytes": tmem.slots.region.resident_bytes() + tmem.segments.region.resident_bytes(),
        "resident_anon": resident.anon,
        "resident_file": resident.file,
        "resident_shmem": resident.shmem,
        **services.request_counts(),
        **services.outcomes,
    }


def _resident(services: Services) -> tuple[Resident, int]:
    """Resident memory of the daemon, and of its pool in bytes, which is part of it: both of one moment, if there is one.

    Frames are released meanwhile. Figures of two moments differ by frames that were counted in one of them only.
    """
    region = services.engine.tmem.arena.region
    pool = region.resident_bytes()
    for _ in range(_MOST_READINGS):
        resident, before, pool = resident_bytes(), pool, region.resident_bytes()
        if pool == before:
            break
    return resident, pool


def _density(services: Services, now: TmemStatistics) -> Values:
    """How densely pages lie, in RAM and on disk, and what keeping them so took."""
    cleaner, merges = services.engine.cleaner, services.engine.tmem.merges.counts
    recompressor = services.engine.recompressor
    written = services.engine.shrinker.counts.written_bytes + merges.cleaned_bytes
    left = cleaner.budget.left_today(time.monotonic())
    return {
        "lz4_pages": now.lz4_pages,
        "zstd_pages": now.zstd_pages,
        "zstd_dict_pages": now.zstd_dict_pages,
        "ram_amplification": now.ram_amplification,
        "disk_amplification": now.disk_amplification,
        "write_amplification": written / now.stored_bytes if now.stored_bytes else 0.0,
        **_histogram("ram_segments_live", now.ram_occupancy),
        **_histogram("disk_segments_live", now.disk_occupancy),
        **{f"{lane}_lane_pages": pages for lane, pages in zip(LANES, now.lane_pages, strict=True)},
        "compactions": merges.compactions,
        "compacted_records": merges.compacted_records,
        "cleanings": merges.cleanings,
        "cleaned_segments": merges.cleaned_segments,
        "cleaned_records": merges.cleaned_records,
        "cleaned_bytes": merges.cleaned_bytes,
        "dictionaries": recompressor.dictionaries,
        "recompressed_segments": recompressor.counts.segments,
        "recompressed_records": recompressor.counts.records,
        "recompressed_saved_bytes": recompressor.counts.saved_bytes,
        "recompressions_not_worth": recompressor.counts.not_worth,
        "cleaner_pauses": cleaner.counts.pauses,
        "cleaner_paused_ms": int(cleaner.counts.paused_s * 1000),
        "cleaner_budget_left": "max" if math.isinf(left) else int(left),
    }


def _pressure(services: Services) -> Values:
    """What memory there is, and what the pool does about it."""
    pressure = services.pressure
    ceiling = pressure.decision.ceiling
    return {
        "pressure_state": pressure.decision.state,
        "pressure_headroom": pressure.headroom,
        "pressure_ceiling": "max" if math.isinf(ceiling) else int(ceiling),
        "pressure_step": int(pressure.decision.step),
        "pressure_samples": pressure.counts.samples,
        "pressure_shrinks": pressure.counts.shrinks,
        "pressure_stalls": pressure.counts.stalls,
        "pressure_strict": pressure.counts.strict,
        "pressure_first_release_us": pressure.counts.first_release_us,
        "pressure_kernel_workers": pressure.tuning.raised_workers,
        "pressure_swap_stalls": pressure.standstill.count,
    }


def _tuning(services: Services) -> Values:
    """What is changed of the machine's settings; '-' for what is not ours to change now."""
    tuning = services.pressure.tuning
    changes = {change.name: change for change in tuning.changes()}
    found: Values = {"kernel_tuning": tuning.mode, "kernel_tuning_in_use": int(tuning.is_engaged)}
    for name in SHARES:
        change = changes.get(name)
        found[name] = change.now if change else "-"
        found[f"{name}_administrators"] = change.administrators if change else "-"
    return {**found, "watermark_boost_off": int(tuning.is_boost_off)}


def _histogram(name: str, counts: tuple[int, ...]) -> Values:
    """Segments by live share, under the upper bound of each bin in percent."""
    return {f"{name}_{(at + 1) * 100 // len(counts)}": count for at, count in enumerate(counts)}


def events(services: Services) -> Values:
    """How often something noteworthy happened since the start."""
    done, reads = services.engine.shrinker.counts, services.engine.reader.counts
    return {
        "shrinks": done.shrinks,
        "shrinks_short": done.shrinks_short,
        "segments_written": done.segments,
        "extents_discarded": services.engine.holes.counts.discarded,
        "stores_refused": services.engine.pager.refused,
        "write_errors": done.write_errors,
        "read_errors": reads.failed,
        "corrupt_records": reads.corrupt + services.engine.tmem.counts.damaged_in_ram,
        "discard_errors": services.engine.holes.counts.discard_errors,
        "cleaner_failures": services.engine.cleaner.counts.failures,
        "job_failures": services.jobs.failures,
        "damaged_while_cleaning": services.engine.tmem.merges.counts.damaged_records,
    }


def shrink_answer(services: Services) -> str:
    """The last answer of control/shrink, flat keyed."""
    last = services.engine.shrinker.last
    if last is None:
        return "requested 0\nfreed 0\nwritten 0\npages 0\nseconds 0\nreason -\n"
    requested = "all" if math.isinf(last.requested) else f"{last.requested:.0f}"
    return (
        f"requested {requested}\nfreed {last.freed}\nwritten {last.written}\npages {last.pages}\n"
        f"seconds {last.seconds:.6f}\nreason {last.reason or '-'}\n"
    )


def compact_answer(services: Services) -> str:
    """The last answer of control/compact, flat keyed."""
    last = services.engine.cleaner.last
    if last is None:
        return "requested 0\nbefore 0\nafter 0\nframes 0\nsegments 0\nwritten 0\nseconds 0\nreason -\n"
    return (
        f"requested {last.requested:.2f}\nbefore {last.before:.3f}\nafter {last.after:.3f}\nframes {last.frames}\n"
        f"segments {last.segments}\nwritten {last.written}\nseconds {last.seconds:.6f}\nreason {last.reason or '-'}\n"
    )


def mm_stat(services: Services) -> str:
    """orig_data_size compr_data_size mem_used_total mem_limit mem_used_max same_pages pages_compacted huge_pages
    huge_pages_since."""
    now = services.statistics()
    same = now.zero_pages + now.fill_pages
    fields = (
        now.pages_stored * PAGE_BYTES,
        now.compressed_bytes,
        now.pool_current,
        services.limits.pool.max,
        now.pool_peak,
        same,
        services.engine.tmem.merges.counts.compacted_records,
        now.raw_pages,
        services.engine.tmem.counts.raw_stores,
    )
    return " ".join(map(str, fields)) + "\n"


def io_stat(services: Services) -> str:
    """failed_reads failed_writes invalid_io notify_free."""
    reads = services.engine.reader.counts
    fields = (reads.failed + reads.corrupt, services.engine.pager.refused, 0, services.engine.tmem.counts.invalidates)
    return " ".join(map(str, fields)) + "\n"


def bd_stat(services: Services) -> str:
    """bd_count bd_reads bd_writes, in blocks of 4 KiB."""
    now, done, reads = services.statistics(), services.engine.shrinker.counts, services.engine.reader.counts
    fields = (now.backing_current, reads.read_bytes, done.written_bytes)
    return " ".join(str(value // BLOCK_BYTES) for value in fields) + "\n"


def metrics(services: Services) -> str:
    """Prometheus text exposition: every number of `stat` and `events`, and whether all is well."""
    lines: list[str] = []
    rare = events(services)
    for key, value in {**stat(services), **rare}.items():
        if not isinstance(value, str) and key != "daemon_pid":
            kind = "counter" if key in _COUNTERS or key in rare else "gauge"
            name = f"tmemfs_{key}" + ("_total" if kind == "counter" else "")
            lines += [f"# TYPE {name} {kind}", f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"]
    healthy = int(services.state() == "running")
    return "\n".join([*lines, "# TYPE tmemfs_healthy gauge", f"tmemfs_healthy {healthy}"]) + "\n"


def segments(services: Services) -> str:
    """segment state lane sequence fill% live% pages, a line each, oldest first."""
    return "".join(
        f"{s.segment} {s.state} {s.lane} {s.sequence} {100 * s.fill_bytes // SEGMENT_BYTES}% "
        f"{100 * s.live_bytes // SEGMENT_BYTES}% {s.pages}\n"
        for s in segment_lines(services.engine.tmem)
    )
