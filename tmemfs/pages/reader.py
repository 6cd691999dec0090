"""The reader: reads records from the tier, verifies and decodes them.

It reads the sectors of a record and nothing else. Records of one request that share blocks, or lie in neighbouring blocks, are read
with one call. If it fails, they are read one by one, because one bad sector may have failed it. No page is put back into RAM: it is
on its way to the kernel, which keeps it from then on.

Invariants:
1. No byte of a record is returned before its checksum, slot, tag and length have been verified.
2. What was pinned is unpinned exactly once, whatever fails.
3. A damaged record fails its own page. Others of the request are read and verified all the same, those behind it in vain: a reply
   has no way to say that a page in its middle is missing (docs/operations.md, 'Damage').

Thread-safety: any number of threads at once; each has a buffer of its own.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from tmemfs.errors import Corrupt, TierError
from tmemfs.store.codec import RAW, ZSTD_DICT, decode
from tmemfs.store.dictionary import DICTIONARY_RECORD_BYTES, Dictionary, read_dictionary
from tmemfs.store.plans import ReadPlan, RecordAt
from tmemfs.store.record import read_record, whole_blocks, write_record
from tmemfs.store.tmem import Tmem
from tmemfs.tiers.tier import Extent, Tier
from tmemfs.units import BLOCK_BYTES, PAGE_BYTES

#: Bytes that one read call may fetch: the pages of a readahead as they were before compression. More is read in several calls.
BUFFER_BYTES: Final = 64 << 10
_WARM_PAGES: Final = 16


@dataclass(slots=True)
class ReadCounts:
    """Since the start. The tier was asked for `records` pages, in `reads` calls of `read_bytes` in all.

    `corrupt` records were found damaged, each counted once; `failed` calls for one page failed.
    """

    records: int = 0
    reads: int = 0
    read_bytes: int = 0
    corrupt: int = 0
    failed: int = 0


class Reader:
    """Reads pages of `tmem` from `tier`. `waiting` loads are under way."""

    def __init__(self, tmem: Tmem, tier: Tier) -> None:
        self._tmem = tmem
        self._tier = tier
        self._buffers = _Buffers()
        self._lock = threading.Lock()
        self.counts = ReadCounts()
        self.waiting = 0

    def warm(self) -> None:
        """Give the calling thread its buffer, and have it do once what it will do: verify and decode pages, and ask the tier."""
        blocks, page = self._buffers.view, bytes(PAGE_BYTES)
        for slot in range(_WARM_PAGES):
            write_record(blocks, 0, RAW, slot, page, 0)
            decode(RAW, read_record(blocks, 0, slot, RAW, PAGE_BYTES, 0))
        with suppress(TierError):  # nothing lies there yet; what counts is the way there
            self._tier.read(Extent(0), 0, blocks[:BLOCK_BYTES], 0)

    def load(self, slot: int) -> bytes:
        """The page of `slot`, which a tier held a moment ago (Tmem.load gave None). Raises TierError, Corrupt.

        It does for one page what `perform` does for many, written out: the p50 of a load from the disk is 184 us instead of 203, on
        caches that the read has left cold.
        """
        while (record := self._tmem.pin_record(slot)) is None:
            page = self._tmem.load(slot)  # it was stored again, or forgotten, since
            if page is not None:
                return page
        with self._lock:
            self.waiting += 1
        size = read = 0
        try:
            sector = self._tier.sector_bytes  # direct I/O reads whole ones
            first = record.offset // sector * sector
            size = -(-record.end // sector) * sector - first
            blocks = self._buffers.view[:size]
            self._tier.read(record.extent, first, blocks, record.sequence)
            read = 1  # counted also if the record is damaged, but not if the tier failed
            return self._decoded(record, blocks, record.offset - first)
        except TierError as error:
            self._note_failure(record, error)
            raise
        finally:
            counts = self.counts
            with self._lock:
                self.waiting -= 1
                counts.records += read
                counts.reads += read
                counts.read_bytes += size * read
            # After the last look at the record: once it is unpinned, its extent may be punched and used again.
            self._tmem.commit_read((record,))

    def perform(self, plan: ReadPlan) -> list[bytes]:
        """The pages of `plan`, up to the first one that fails. Commits the plan.

        Raises TierError, Corrupt if that is the first page.
        """
        failures: dict[int, TierError] = {}
        with self._lock:
            self.waiting += 1
        try:
            # Each run is decoded before the next one is read: they share the thread's buffer.
            for run in _runs(plan.records):
                self._read_run(run, plan.pages, failures)
        finally:
            with self._lock:
                self.waiting -= 1
            self._tmem.commit_read(plan.records)
        if 0 in failures:
            raise failures[0]
        return [page for page in plan.pages[: min(failures, default=None)] if page is not None]

    def _read_run(self, run: list[RecordAt], pages: list[bytes | None], failures: dict[int, TierError]) -> None:
        """Read the records of `run` to `pages`; those that fail go to `failures`."""
        try:
            blocks, first = self._fetch(run)
        except TierError as error:
            if len(run) > 1:
                self._read_singly(run, pages, failures)
            else:
                self._note_failure(run[0], error)
                failures[run[0].at] = error
            return
        for record in run:
            try:
                pages[record.at] = self._decoded(record, blocks, record.offset - first)
            except TierError as error:
                self._note_failure(record, error)
                failures[record.at] = error

    def _read_singly(self, run: list[RecordAt], pages: list[bytes | None], failures: dict[int, TierError]) -> None:
        """Read the records of `run`, whose call failed, in the order of the request, up to the first one that fails again."""
        for record in sorted(run):
            self._read_run([record], pages, failures)
            # What is behind it could not be sent, and a disk that fails may take many seconds for each call.
            if record.at in failures:
                return

    def _fetch(self, run: list[RecordAt]) -> tuple[memoryview, int]:
        """The sectors of `run`, in the thread's buffer, and where in the extent they begin."""
        sector = self._tier.sector_bytes
        first = run[0].offset // sector * sector
        size = -(-run[-1].end // sector) * sector - first
        blocks = self._buffers.view[:size]
        self._tier.read(run[0].extent, first, blocks, run[0].sequence)
        with self._lock:
            self.counts.records += len(run)
            self.counts.reads += 1
            self.counts.read_bytes += size
        return blocks, first

    def _decoded(self, record: RecordAt, blocks: memoryview, at: int) -> bytes:
        payload = read_record(blocks, at, record.slot, record.tag, record.length, record.seed)
        if record.tag == ZSTD_DICT:
            return self._dictionary(record).decode(payload)
        return decode(record.tag, payload)

    def _note_failure(self, record: RecordAt, error: TierError) -> None:
        damage = self._tmem.damage
        is_corrupt = isinstance(error, Corrupt)
        is_new = is_corrupt and damage.note_record(record.seed, record.offset, "on_tier")
        if not is_corrupt:
            damage.note_failed_read()
        with self._lock:
            self.counts.corrupt += is_new
            self.counts.failed += not is_corrupt

    def _dictionary(self, record: RecordAt) -> Dictionary:
        """What `record` was encoded with; it has to be read from its segment only once, after a crash."""
        found = self._tmem.dictionaries.known(record.dictionary)
        if found is None:
            # Not into the thread's buffer, which holds the record that is to be decoded.
            blocks = memoryview(mmap.mmap(-1, whole_blocks(DICTIONARY_RECORD_BYTES)))
            self._tier.read(record.extent, 0, blocks, record.sequence)
            data = read_dictionary(blocks, record.seed)
            # Read without the lock; another thread may have adopted it meanwhile, and the first one stays.
            with self._tmem.lock:
                found = self._tmem.dictionaries.adopt(record.dictionary, data)
        return found


class _Buffers(threading.local):
    """A page-aligned, faulted-in buffer for the calling thread."""

    def __init__(self) -> None:
        self.view = memoryview(
            mmap.mmap(
                -1,
                BUFFER_BYTES,
                flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE,
            )
        )


def _block_end(record: RecordAt) -> int:
    return -(-record.end // BLOCK_BYTES) * BLOCK_BYTES


def _runs(records: Iterable[RecordAt]) -> Iterator[list[RecordAt]]:
    """Records that one read fetches without reading a whole block that holds none of them."""
    run: list[RecordAt] = []
    for record in sorted(records, key=attrgetter("extent", "offset")):
        block = record.offset // BLOCK_BYTES * BLOCK_BYTES
        start = run[0].offset // BLOCK_BYTES * BLOCK_BYTES if run else 0
        if run and (record.extent != run[0].extent or block > _block_end(run[-1]) or _block_end(record) - start > BUFFER_BYTES):
            yield run
            run = []
        run.append(record)
    if run:
        yield run
