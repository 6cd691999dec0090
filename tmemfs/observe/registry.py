"""The registry: every metric of tmemfs, once.

control/stat, events, metrics and zram's three files show these metrics in this order, docs/control.md documents them, and
`tmemfs stat` takes their units from here. A new statistic is one entry in a section below, and `make docs`.

Invariants:
1. No metric scans slots or segments. Each reads a counter that is kept as pages come and go, or asks the kernel for one figure.
   (control/segments lists every segment. It is no metric, and reads a few segments at a time.)
2. A name is a stable interface: tools read it.
3. A name is unique, and an event is no key of stat: both become names of Prometheus.
"""

from __future__ import annotations

from typing import Final, get_args

from tmemfs.observe.metric import EVENTS, STAT_ONLY, Metric, Output, Section, Unit
from tmemfs.system.status_region import Word
from tmemfs.units import BLOCK_BYTES, PAGE_BYTES, SEGMENT_BYTES

_MM_STAT: Final[frozenset[Output]] = frozenset(("mm_stat",))
_IO_STAT: Final[frozenset[Output]] = frozenset(("io_stat",))
_BD_STAT: Final[frozenset[Output]] = frozenset(("bd_stat",))
_METRICS: Final[frozenset[Output]] = frozenset(("metrics",))

_DAEMON: Final = Section("The daemon", (
    Metric("version", "info", "-", "Version of the daemon.", lambda s: s.version),
    Metric("daemon_pid", "info", "-", "Process id of the daemon.", lambda s: s.pid, STAT_ONLY),
    Metric("worker_pid", "info", "-", "Process id of the worker, which serves the mount for the daemon.", lambda s: s.worker_pid,
        STAT_ONLY),
    Metric("worker_spare_pid", "info", "-", "Process id of the spare worker, which needs no memory to take over; 0: none is ready.",
        lambda s: s.supervised(Word.SPARE_PID), STAT_ONLY),
    Metric("worker_generation", "gauge", "1", "Workers that were started so far, this one included.",
        lambda s: s.supervised(Word.GENERATION)),
    Metric("worker_killed", "counter", "1", "Workers that were killed from outside.",
        lambda s: s.supervised(Word.DEATHS_KILLED)),
    Metric("worker_crashed", "counter", "1", "Workers that ended by a bug.", lambda s: s.supervised(Word.DEATHS_CRASHED)),
    Metric("worker_hung", "counter", "1", "Workers that were replaced because they answered nothing for the watchdog's time.",
        lambda s: s.supervised(Word.DEATHS_HUNG)),
    Metric("upgrades", "counter", "1", "Handovers to another version.", lambda s: s.supervised(Word.UPGRADES)),
    Metric("poisoned_requests", "counter", "requests", "Requests answered with an error because workers had died of them.",
        lambda s: s.request_count("poisoned")),
    Metric("codec", "info", "-", "How pages are compressed that are stored from now on.", lambda s: s.codec),
    Metric("compiled", "gauge", "0/1", "1: stores go through compiled functions.", lambda s: s.is_compiled),
    Metric("swap_size", "gauge", "bytes", "Logical size of the swap image.", lambda s: s.swap_bytes),
    Metric("requests", "counter", "requests", "Requests for the image.", lambda s: s.request_count("requests")),
    Metric("deferred", "counter", "requests", "Requests that needed the disk or waited for a free frame.",
        lambda s: s.request_count("deferred")),
    Metric("healthy", "gauge", "0/1", "1 while control/state says running.", lambda s: int(s.is_healthy), _METRICS),
))  # fmt: skip

_PAGES: Final = Section("Pages", (
    Metric("pages_stored", "gauge", "pages", "Live pages, zero pages included.", lambda s: s.store.pages_stored),
    Metric("pages_in_ram", "gauge", "pages", "Live pages in RAM; zero pages take no memory and are not counted.",
        lambda s: s.store.pages_in_ram),
    Metric("pages_on_disk", "gauge", "pages", "Live pages on disk.", lambda s: s.store.pages_on_disk),
    Metric("zero_pages", "gauge", "pages", "Live zero pages.", lambda s: s.store.zero_pages),
    Metric("same_filled_pages", "gauge", "pages", "Live same-filled pages: of one repeated word of 8 bytes, zero pages included.",
        lambda s: s.same_filled_pages),
    Metric("incompressible_pages", "gauge", "pages", "Live raw pages: they do not compress, and are kept as they are.",
        lambda s: s.store.raw_pages),
    Metric("lz4_pages", "gauge", "pages", "Live pages encoded with lz4.", lambda s: s.store.lz4_pages),
    Metric("zstd_pages", "gauge", "pages", "Live pages encoded with zstd, without a dictionary.", lambda s: s.store.zstd_pages),
    Metric("zstd_dict_pages", "gauge", "pages", "Live pages encoded with zstd and a dictionary, by recompression.",
        lambda s: s.store.zstd_dict_pages),
    Metric("compressed_bytes", "gauge", "bytes", "Payloads of all live pages, in RAM and on disk.",
        lambda s: s.store.compressed_bytes),
    Metric("stores", "counter", "pages", "Pages stored.", lambda s: s.store.stores),
    Metric("bytes_stored", "counter", "bytes", "Payloads of the pages stored.", lambda s: s.store.stored_bytes),
    Metric("loads_ram", "counter", "pages", "Pages loaded from RAM; zero pages are not counted.", lambda s: s.store.loads_ram),
    Metric("loads_disk", "counter", "pages", "Pages loaded from disk.", lambda s: s.store.loads_disk),
    Metric("invalidates", "counter", "pages", "Pages invalidated.", lambda s: s.store.invalidates),
))  # fmt: skip

_POOL: Final = Section("RAM", (
    Metric("pool_current", "gauge", "bytes", "RAM that the frames hold, ready frames included.",
        lambda s: s.store.pool_current),
    Metric("pool_used", "gauge", "bytes", "RAM of the frames that hold a segment.", lambda s: s.store.pool_used),
    Metric("pool_clean", "gauge", "bytes", "RAM of the frames whose segment lies on the backing, too: it can be had without I/O.",
        lambda s: len(s.engine.tmem.clean) * SEGMENT_BYTES),
    Metric("pool_peak", "gauge", "bytes", "The most that pool_current has been.", lambda s: s.store.pool_peak),
    Metric("pool_max", "gauge", "bytes", "The limit, as in pool.max.", lambda s: s.services.limits.pool.max),
    Metric("pool_resident", "gauge", "bytes", "Frame memory according to the kernel.", lambda s: s.pool_resident),
    Metric("table_bytes", "gauge", "bytes", "Memory of the tables of slots and segments according to the kernel.",
        lambda s: s.table_bytes),
    Metric("resident_anon", "gauge", "bytes", "Anonymous memory of supervisor, worker and spare, added up (RssAnon).",
        lambda s: s.resident.anon),
    Metric("resident_file", "gauge", "bytes", "Mapped files of the worker (RssFile); supervisor and spare have them mapped, too.",
        lambda s: s.resident.file),
    Metric("resident_shmem", "gauge", "bytes", "Shared memory of the daemon (RssShmem): the frames, tables and request buffers.",
        lambda s: s.resident.shmem),
))  # fmt: skip

_BACKING: Final = Section("The backing", (
    Metric("backing_current", "gauge", "bytes",
        "Whole blocks of extents in use, those included whose hole is still to be punched.", lambda s: s.store.backing_current),
    Metric("backing_max", "gauge", "bytes", "The limit, as in backing.max.", lambda s: s.services.limits.backing),
    Metric("backing_discards", "gauge", "0/1", "1: the backing can discard, so the space of freed extents is given back.",
        lambda s: int(s.engine.tier.can_discard)),
    Metric("backing_encrypted", "gauge", "0/1", "1: what goes to the backing is encrypted.",
        lambda s: int(s.engine.tier.is_encrypted)),
    Metric("pages_written", "counter", "pages", "Pages written back.", lambda s: s.writes.pages),
    Metric("bytes_written", "counter", "bytes", "Bytes written back, without cleaned_bytes.",
        lambda s: s.writes.written_bytes),
    Metric("bytes_written_ahead", "counter", "bytes", "Of these, bytes written before their memory was wanted (writeahead).",
        lambda s: s.engine.write_ahead.written_bytes),
    Metric("bytes_died_clean", "counter", "bytes", "Live bytes of these that died in RAM: they need not have been written.",
        lambda s: s.engine.tmem.clean.died_bytes),
    Metric("clean_dropped", "counter", "segments", "Segments that left RAM without I/O, as they were on the backing already.",
        lambda s: s.engine.tmem.clean.dropped),
    Metric("writers", "gauge", "1", "Segments that are written back at once, as found by trial.",
        lambda s: s.engine.shrinker.writers.count),
    Metric("bytes_released", "counter", "bytes", "RAM released to the kernel.", lambda s: s.writes.released_bytes),
    Metric("disk_reads", "counter", "requests", "Reads from the backing.", lambda s: s.reads.reads),
    Metric("disk_read_bytes", "counter", "bytes", "Bytes of these reads.", lambda s: s.reads.read_bytes),
))  # fmt: skip

_DENSITY: Final = Section("Density", (
    Metric("ram_amplification", "gauge", "1",
        "Space amplification in RAM: bytes occupied per live byte, without the open segments.",
        lambda s: s.store.ram_amplification),
    Metric("disk_amplification", "gauge", "1", "Space amplification on disk: bytes occupied per live byte.",
        lambda s: s.store.disk_amplification),
    Metric("write_amplification", "gauge", "1", "bytes_written and cleaned_bytes per byte of bytes_stored.",
        lambda s: s.write_amplification),
    Metric("compactions", "counter", "1", "Merges in RAM.", lambda s: s.merges.compactions),
    Metric("cleanings", "counter", "1", "Merges on disk.", lambda s: s.merges.cleanings),
    Metric("cleaned_segments", "counter", "segments", "Segments that merges on disk have read and freed.",
        lambda s: s.merges.cleaned_segments),
    Metric("cleaned_bytes", "counter", "bytes", "Bytes that merges on disk have written.", lambda s: s.merges.cleaned_bytes),
    Metric("cleaner_paused_ms", "counter", "ms",
        "Time that the cleaner waited for loads from disk, or after a refused store.",
        lambda s: int(s.cleaner.counts.paused_s * 1000)),
    Metric("cleaner_budget_left", "gauge", "bytes", "What is left of clean.daily.",
        lambda s: s.cleaner_budget_left),
    Metric("dictionaries", "gauge", "1", "Dictionaries in use.", lambda s: s.engine.recompressor.dictionaries),
    Metric("recompressed_records", "counter", "records", "Records that recompression has encoded.",
        lambda s: s.recompression.records),
    Metric("recompressed_saved_bytes", "counter", "bytes", "Bytes that this has saved.", lambda s: s.recompression.saved_bytes),
    Metric("recompressions_not_worth", "counter", "segments",
        "Segments that recompression left as they are, because it would have saved less than a tenth.",
        lambda s: s.recompression.not_worth),
))  # fmt: skip

_PRESSURE: Final = Section("Memory pressure", (
    Metric("pressure_state", "info", "-", "State of the pressure controller: relaxed, holding, shrinking or critical.",
        lambda s: s.pressure.decision.state, STAT_ONLY),
    Metric("pressure_headroom", "gauge", "bytes", "Headroom: memory that can still be had without the pool.",
        lambda s: s.pressure.headroom),
    Metric("pressure_ceiling", "gauge", "bytes", "What the pool may hold while memory is short.",
        lambda s: s.pressure_ceiling),
    Metric("pressure_samples", "counter", "1", "Samples taken.", lambda s: s.pressure.counts.samples),
    Metric("pressure_shrinks", "counter", "1", "Samples after which the pool had to shrink.", lambda s: s.pressure.counts.shrinks),
    Metric("pressure_stalls", "counter", "1", "Samples that found a stall (PSI).", lambda s: s.pressure.counts.stalls),
    Metric("pressure_first_release_us", "gauge", "us",
        "Time from the last fall of headroom below the reserve to the first frame released, in steps of 10 ms.",
        lambda s: s.pressure.counts.first_release_us),
    Metric("pressure_swap_stalls", "counter", "1",
        "Swap stalls: no page was stored or loaded for 0.25 s while memory was short and pages were under writeback. "
        "vm.min_free_kbytes is then lowered for two seconds at most.",
        lambda s: s.pressure.swap_stall.count),
))  # fmt: skip

_SETTINGS: Final = Section("Kernel settings", (
    Metric("kernel_tuning_in_use", "gauge", "0/1", "1 while this daemon may change kernel settings.",
        lambda s: int(s.tuning.is_engaged)),
    Metric("min_free_kbytes", "gauge", "kB", "vm.min_free_kbytes now.", lambda s: s.setting("min_free_kbytes")),
    Metric("min_free_kbytes_administrators", "gauge", "kB", "The administrator's value.",
        lambda s: s.setting_of_administrator("min_free_kbytes")),
    Metric("watermark_boost_factor", "gauge", "1", "vm.watermark_boost_factor now.", lambda s: s.setting("watermark_boost_factor")),
    Metric("watermark_boost_factor_administrators", "gauge", "1", "The administrator's value.",
        lambda s: s.setting_of_administrator("watermark_boost_factor")),
    Metric("watermark_boost_off", "gauge", "0/1", "1 while the kernel does not raise its minimum watermark for fragmented memory.",
        lambda s: int(s.tuning.is_boost_off)),
    Metric("pressure_kernel_workers", "gauge", "1",
        "Kworkers that have real-time priority now, so that the loop device can send its requests.",
        lambda s: s.tuning.raised_workers),
))  # fmt: skip

_LATENCY: Final = Section("Latency", (
    Metric("latency_held", "gauge", "0/1", "1 while idle CPUs are kept awake; - if this machine does not allow it.",
        lambda s: s.is_latency_held),
    Metric("latency_bursts", "counter", "1", "Bursts of requests for which idle CPUs were kept awake.",
        lambda s: s.services.latency.bursts),
    Metric("latency_held_ms", "counter", "ms", "Time for which idle CPUs were kept awake.",
        lambda s: int(s.services.latency.held_s * 1000)),
))  # fmt: skip

_PROTECTIONS: Final = Section("Protections of the daemon", (
    Metric("memory_locked", "gauge", "0/1", "1: all of its memory is locked.", lambda s: s.outcome("memory_locked")),
    Metric("oom_score_adj_set", "gauge", "0/1", "1: the OOM killer does not choose it.", lambda s: s.outcome("oom_score_adj_set")),
    Metric("oom_worker_first", "gauge", "0/1",
        "1: the OOM killer would choose the worker, which is replaced, and not the supervisor.",
        lambda s: s.outcome("oom_worker_first")),
    Metric("io_flusher", "gauge", "0/1", "1: the kernel knows that page reclaim depends on it.",
        lambda s: s.outcome("io_flusher")),
    Metric("realtime", "gauge", "0/1", "1: it has real-time priority.", lambda s: s.outcome("realtime")),
    Metric("core_dumps_off", "gauge", "0/1", "1: it writes no core file.", lambda s: s.outcome("core_dumps_off")),
    Metric("heap_kept", "gauge", "0/1", "1: malloc keeps what is freed, so the page path needs no memory from the kernel.",
        lambda s: s.outcome("heap_kept")),
    Metric("gc_frozen", "gauge", "0/1", "1: the garbage collector skips what was loaded at the start.",
        lambda s: s.outcome("gc_frozen")),
))  # fmt: skip

_EVENTS: Final = Section("Events", (
    Metric("worker_deaths", "counter", "1", "Workers that ended otherwise than by an unmount, and were replaced.",
        lambda s: s.supervised(Word.DEATHS), EVENTS),
    Metric("shrinks", "counter", "1", "Shrinks on request.", lambda s: s.writes.shrinks, EVENTS),
    Metric("shrinks_short", "counter", "1", "Shrinks on request that fell short.", lambda s: s.writes.shrinks_short, EVENTS),
    Metric("stores_refused", "counter", "requests",
        "Writes, and discards of parts of pages, that were refused because no frame could be freed.",
        lambda s: s.engine.pager.refused, EVENTS),
    Metric("write_errors", "counter", "requests", "Writes to the backing that failed; they are tried again.",
        lambda s: s.writes.write_errors, EVENTS),
    Metric("read_errors", "counter", "requests", "Reads of a record from the backing that failed.",
        lambda s: s.reads.failed, EVENTS),
    Metric("corrupt_records", "counter", "records", "Records that loads found damaged, on disk or in RAM; each counts once.",
        lambda s: s.reads.corrupt + s.counts.damaged_in_ram, EVENTS),
    Metric("damaged_while_cleaning", "counter", "records", "Damaged records that merges have found; they stay where they are.",
        lambda s: s.merges.damaged_records, EVENTS),
    Metric("discard_errors", "counter", "requests", "Discards that failed; they are tried again.",
        lambda s: s.engine.holes.counts.discard_errors, EVENTS),
    Metric("cleaner_failures", "counter", "1", "Merges that could not be finished because the backing failed.",
        lambda s: s.cleaner.counts.failures, EVENTS),
    Metric("job_failures", "counter", "1", "Jobs that failed and were started again.",
        lambda s: s.services.jobs.failures, EVENTS),
))  # fmt: skip

_ZRAM: Final = Section("zram's files", (
    Metric("orig_data_size", "gauge", "bytes", "Live pages, uncompressed.", lambda s: s.store.pages_stored * PAGE_BYTES, _MM_STAT),
    Metric("compr_data_size", "gauge", "bytes", "Their payloads, in RAM and on disk.",
        lambda s: s.store.compressed_bytes, _MM_STAT),
    Metric("mem_used_total", "gauge", "bytes", "RAM of the pool; what is on disk is not counted.",
        lambda s: s.store.pool_current, _MM_STAT),
    Metric("mem_limit", "gauge", "bytes", "pool.max; never 0.", lambda s: s.services.limits.pool.max, _MM_STAT),
    Metric("mem_used_max", "gauge", "bytes", "The most RAM that the pool has held.", lambda s: s.store.pool_peak, _MM_STAT),
    Metric("same_pages", "gauge", "pages", "Live same-filled pages.", lambda s: s.same_filled_pages, _MM_STAT),
    Metric("pages_compacted", "counter", "records", "Records merged in RAM.", lambda s: s.merges.compacted_records, _MM_STAT),
    Metric("huge_pages", "gauge", "pages", "Live raw pages: they do not compress, and are kept as they are.",
        lambda s: s.store.raw_pages, _MM_STAT),
    Metric("huge_pages_since", "counter", "pages", "Raw pages stored.",
        lambda s: s.counts.raw_stores, _MM_STAT),
    Metric("failed_reads", "counter", "requests",
        "Records that loads could not read from the backing, or found damaged there.",
        lambda s: s.reads.failed + s.reads.corrupt, _IO_STAT),
    Metric("failed_writes", "counter", "requests", "As stores_refused in events.",
        lambda s: s.engine.pager.refused, _IO_STAT),
    Metric("invalid_io", "counter", "requests", "Always 0.", lambda s: 0, _IO_STAT),
    Metric("notify_free", "counter", "pages", "Pages invalidated.", lambda s: s.counts.invalidates, _IO_STAT),
    Metric("bd_count", "gauge", "pages", "Disk in use, in blocks of 4 KiB.",
        lambda s: s.store.backing_current // BLOCK_BYTES, _BD_STAT),
    Metric("bd_reads", "counter", "pages", "Blocks of 4 KiB read.", lambda s: s.reads.read_bytes // BLOCK_BYTES, _BD_STAT),
    Metric("bd_writes", "counter", "pages", "Blocks of 4 KiB written back.",
        lambda s: s.writes.written_bytes // BLOCK_BYTES, _BD_STAT),
))  # fmt: skip

#: In the order of the files and of the documentation.
SECTIONS: Final = (
    _DAEMON, _PAGES, _POOL, _BACKING, _DENSITY, _PRESSURE, _SETTINGS, _LATENCY, _PROTECTIONS, _EVENTS, _ZRAM,
)  # fmt: skip
_SHOWN: Final[dict[Output, tuple[Metric, ...]]] = {
    output: tuple(metric for section in SECTIONS for metric in section.metrics if output in metric.outputs)
    for output in get_args(Output)
}


def shown_in(output: Output) -> tuple[Metric, ...]:
    """The metrics of one control file, in its order."""
    return _SHOWN[output]


def units() -> dict[str, Unit]:
    """The unit of every key of control/stat."""
    return {metric.name: metric.unit for metric in shown_in("stat")}
