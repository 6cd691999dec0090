# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The two functions that every stored page goes through, compiled: `encode_lz4` (codec.py) and `Appender.append` (append.py); and
`count_pool` (recovery.py), which a start waits for.

They do what their pure-Python namesakes do, which stay, and are used where this was not built; tests hold the two against each
other. lz4 and xxhash are called directly: a batch is compressed without the interpreter's lock. The order of a store (record,
fill, handle) is kept by releasing stores, which neither compiler nor processor moves.
"""

import sys

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from tmemfs.store import constants

cdef extern from "lz4.h" nogil:
    int LZ4_compress_default(const char *source, char *into, int size, int capacity)

cdef extern from *:
    """
    #define XXH_INLINE_ALL
    #include <xxhash.h>
    #define store_release(at, value) __atomic_store_n((at), (value), __ATOMIC_RELEASE)
    """
    uint64_t XXH3_64bits_withSeed(const void *data, size_t size, uint64_t seed) nogil
    void store_release(uint64_t *at, uint64_t value) nogil

include "constants.pxi"

cdef enum:
    #: Pages that are compressed before the interpreter's lock is taken again; their payloads lie on the stack.
    GROUP = 8
    #: Lanes that take new records: packed and raw ones.
    LANES = 2

# A module from an earlier build would lay records out as they were then. A big-endian machine would write their words reversed.
if BUILT_FROM != constants.BUILT_FROM or sys.byteorder != "little":
    raise ImportError("compiled from another version of tmemfs, or for a big-endian machine: run 'make setup' again")

cdef tuple ZERO_PACKED = (ZERO, b"")


def encode_lz4(const unsigned char[::1] pages not None):
    """(tag, payload) of every page in `pages`, whose length is a multiple of PAGE_BYTES."""
    cdef char payloads[GROUP][LARGEST_COMPRESSED_BYTES]
    cdef int sizes[GROUP]
    cdef list packed = []
    cdef Py_ssize_t first, at, count = pages.shape[0] // PAGE_BYTES
    cdef const char *page
    cdef int many
    for first in range(0, count, GROUP):
        page = <const char *>&pages[first * PAGE_BYTES]
        many = <int>min(count - first, GROUP)
        with nogil:
            for at in range(many):
                sizes[at] = compressed(page + at * PAGE_BYTES, payloads[at])
        for at in range(many):
            if sizes[at] > 0:
                packed.append((LZ4, PyBytes_FromStringAndSize(payloads[at], sizes[at])))
            elif sizes[at] == 0:
                packed.append((RAW, PyBytes_FromStringAndSize(page + at * PAGE_BYTES, PAGE_BYTES)))
            elif (<const uint64_t *>(page + at * PAGE_BYTES))[0]:
                packed.append((FILL, PyBytes_FromStringAndSize(page + at * PAGE_BYTES, WORD_BYTES)))
            else:
                packed.append(ZERO_PACKED)
    return packed


cdef inline int compressed(const char *page, char *into) noexcept nogil:
    """Size of the payload of lz4 in `into`; 0 if it is too large to keep, -1 if one word fills the page."""
    return -1 if is_filled(page) else LZ4_compress_default(page, into, PAGE_BYTES, LARGEST_COMPRESSED_BYTES)


cdef bint is_filled(const char *page) noexcept nogil:
    """Whether one word is repeated all over `page`: then it equals itself moved by a word."""
    return memcmp(page, page + PAGE_BYTES - WORD_BYTES, WORD_BYTES) == 0 and memcmp(page, page + WORD_BYTES, PAGE_BYTES - WORD_BYTES) == 0


# ---- records and handles: record.py, in C ----------------------------------------------------------------------------


cdef inline uint64_t record_bytes(uint64_t length) noexcept nogil:
    """Bytes a record with `length` bytes of payload occupies, padding included."""
    return (RECORD_HEADER_BYTES + length + GRAIN_BYTES - 1) // GRAIN_BYTES * GRAIN_BYTES


cdef inline uint64_t start_of(uint64_t offset, uint64_t length) noexcept nogil:
    """Where a record may start at or after `offset`: never so that it touches three blocks."""
    if offset % BLOCK_BYTES + RECORD_HEADER_BYTES + length > 2 * BLOCK_BYTES:
        return (offset + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES
    return offset


cdef inline uint64_t handle_of(uint64_t tag, uint64_t length, uint64_t offset, uint64_t segment) noexcept nogil:
    """The handle of a record with `length` bytes of payload, `offset` bytes into `segment`."""
    return tag | length << LENGTH_SHIFT | offset << OFFSET_BYTES_SHIFT | segment << SEGMENT_SHIFT


cdef inline void write_record(
    unsigned char *at, uint64_t tag, uint64_t slot, const char *payload, uint64_t length, uint64_t seed
) noexcept nogil:
    """Write a record at `at`. `seed` is the segment's."""
    cdef uint64_t word = XXH3_64bits_withSeed(payload, length, seed | tag << SEED_TAG_SHIFT | slot) & CHECKSUM_MASK
    cdef uint32_t owner = <uint32_t>slot
    word |= length << LENGTH_SHIFT | tag
    # A record starts on a grain of 4 bytes: its word of 8 is not aligned, so it is copied and not assigned.
    memcpy(at, &word, sizeof(word))
    memcpy(at + sizeof(word), &owner, sizeof(owner))
    memcpy(at + RECORD_HEADER_BYTES, payload, length)


#: A lane's open segment, as lanes.Lane has it.
cdef struct Open:
    bint is_known
    uint64_t segment
    uint64_t base
    uint64_t fill
    uint64_t seed


#: What a call has changed and the ledger's counters do not say yet: all of them but those of the tier.
cdef struct Changes:
    Open lanes[LANES]
    int64_t by_tag[TAGS]
    int64_t compressed_bytes
    int64_t live_bytes
    int64_t stored_bytes
    int64_t raw_stores


cdef class Ledger:
    """The compiled half of ledger.Ledger: shares its arrays, and does to them what its `add` and the plain case of `drop` do."""

    cdef list _counters
    cdef int32_t[::1] _live
    cdef int32_t[::1] _pages
    cdef int32_t[::1] _floor
    cdef int64_t[::1] _base

    def __init__(self, ledger, segments):
        self._counters = ledger.counters[0]
        self._live = ledger.live
        self._pages = ledger.pages
        self._floor = ledger.occupancy.floor
        self._base = segments.base

    cdef inline void append(self, Changes *changes, int tag, uint64_t length, uint64_t size, uint64_t segment) noexcept:
        """A record was appended to `segment`, which is open."""
        self._live[segment] += <int32_t>size
        self._pages[segment] += 1
        changes.live_bytes += size
        changes.compressed_bytes += length
        changes.stored_bytes += length
        changes.raw_stores += tag == RAW

    cdef inline bint drop(self, Changes *changes, uint64_t old) noexcept:
        """A slot does not refer to the record of `old` any more; False, and nothing done, where that has consequences."""
        cdef uint64_t length = old >> LENGTH_SHIFT & LENGTH_MASK, segment = old >> SEGMENT_SHIFT
        cdef int tag = old & TAG_MASK
        cdef int32_t size = <int32_t>record_bytes(length)
        if tag != ZERO:
            # On the tier, the last of its segment, or in one that belongs to a lower level of the index then.
            if self._base[segment] < 0 or self._live[segment] == size or self._live[segment] - size < self._floor[segment]:
                return False
            self._live[segment] -= size
            self._pages[segment] -= 1
            changes.live_bytes -= size
            changes.compressed_bytes -= length
        changes.by_tag[tag] -= 1
        return True

    cdef int add(self, Changes *changes, Py_ssize_t stores) except -1:
        """Add `changes` to the counters: once for a batch, since each of them is an object of Python."""
        cdef list counters = self._counters
        cdef int tag
        for tag in range(TAGS):
            if changes.by_tag[tag]:
                counters[tag] += changes.by_tag[tag]
        counters[COMPRESSED_BYTES] += changes.compressed_bytes
        counters[LIVE_BYTES] += changes.live_bytes
        counters[STORED_BYTES] += changes.stored_bytes
        counters[STORES] += stores
        if changes.raw_stores:
            counters[RAW_STORES] += changes.raw_stores
        return 0


cdef class Appender:
    """Appends encoded pages to the open segments of `transitions`, for `slots`. Guarded by the store's lock."""

    cdef object _transitions
    cdef Ledger _ledger
    cdef uint64_t _slots
    cdef uint64_t[::1] _handles
    cdef uint64_t[::1] _words
    cdef unsigned char[::1] _arena

    def __init__(self, slots, transitions):
        self._transitions = transitions
        self._ledger = Ledger(transitions.ledger, transitions.segments)
        self._slots = slots.count
        self._handles = slots.handles
        self._words = transitions.segments.words
        self._arena = transitions.arena.view

    def append(self, uint64_t first, list packed not None, Py_ssize_t start=0):
        """Store entries of `packed` from `start` on, for slots first+start, ...; gives how many entries are stored now."""
        if first > self._slots or <uint64_t>len(packed) > self._slots - first:
            raise IndexError(f"there is no slot {int(first) + len(packed) - 1}")
        if start < 0:
            raise IndexError(f"there is no entry {start}")
        cdef Changes changes
        memset(&changes, 0, sizeof(changes))
        cdef Py_ssize_t number = start, count = len(packed)
        cdef tuple entry
        try:
            while number < count:
                entry = <tuple?>packed[number]
                if len(entry) != 2 or not ZERO <= entry[0] < TAGS:
                    raise TypeError(f"a tag and a payload are wanted, not {entry}")
                if not self._store(&changes, first + number, entry[0], <bytes?>entry[1]):
                    break
                number += 1
        finally:
            self._advance(&changes)
            self._ledger.add(&changes, number - start)
        return number

    cdef bint _store(self, Changes *changes, uint64_t slot, int tag, bytes payload) except -1:
        """Store one page; False if there is no frame for it."""
        if len(payload) > PAGE_BYTES:
            raise ValueError(f"a payload of {len(payload)} bytes is longer than a page")
        cdef uint64_t handle = ZERO_HANDLE, at, size, length = PyBytes_GET_SIZE(payload)
        cdef Open *lane = &changes.lanes[tag == RAW]
        if tag != ZERO:
            if not lane.is_known:
                self._know(lane, tag == RAW)
            # Packed payloads are too short to touch three blocks.
            at = start_of(lane.fill, length) if tag == RAW else lane.fill
            if at + RECORD_HEADER_BYTES + length > SEGMENT_BYTES:
                if not self._open_next(lane, tag == RAW):
                    return False
                at = 0
            elif at != lane.fill:
                memset(&self._arena[lane.base + lane.fill], 0, GRAIN_BYTES)
            write_record(&self._arena[lane.base + at], tag, slot, PyBytes_AS_STRING(payload), length, lane.seed)
            size = record_bytes(length)
            lane.fill = at + size
            store_release(&self._words[lane.segment * WORDS_PER_SEGMENT + FILL_WORD], lane.fill)
            self._ledger.append(changes, tag, length, size, lane.segment)
            handle = handle_of(tag, length, at, lane.segment)
        cdef uint64_t old = self._handles[slot]
        store_release(&self._handles[slot], handle)
        changes.by_tag[tag] += 1
        if old and not self._ledger.drop(changes, old):
            self._transitions.drop(old)
        return True

    cdef int _know(self, Open *lane, int index) except -1:
        """Take over where the lane's open segment is."""
        python = self._transitions.lanes[index]
        lane.segment = python.segment
        lane.base = python.base
        lane.fill = python.fill
        lane.seed = python.seed
        lane.is_known = True
        return 0

    cdef bint _open_next(self, Open *lane, int index) except -1:
        """Have the lane open another segment; False if there is no frame."""
        python = self._transitions.lanes[index]
        python.advance(lane.fill)
        lane.is_known = False
        if not self._transitions.open_next(python):
            return False
        self._know(lane, index)
        return True

    cdef int _advance(self, Changes *changes) except -1:
        """Tell the lanes how far their open segments are filled."""
        cdef int index
        for index in range(LANES):
            if changes.lanes[index].is_known:
                self._transitions.lanes[index].advance(changes.lanes[index].fill)
        return 0


# ---- the scan of a start: recovery.py, in C ----------------------------------------------------------------------------


#: What a scan has found, as ledger.Totals has it.
cdef struct Found:
    int64_t by_tag[TAGS]
    int64_t compressed_bytes
    int64_t live_bytes
    int64_t tier_pages
    int64_t tier_live_bytes
    int64_t cold_pages
    int64_t cold_raw_pages


def count_pool(
    const uint64_t[::1] handles not None,
    const uint64_t[::1] words not None,
    uint64_t segments,
    int32_t[::1] live not None,
    int32_t[::1] pages not None,
):
    """Totals of the pool with `handles`, as a tuple; None where a handle refers to nothing. Adds to `live` and `pages`.

    `words` are those of the segment table, which has `segments` segments, as many as `live` and `pages`.
    """
    if <uint64_t>words.shape[0] < segments * WORDS_PER_SEGMENT or min(live.shape[0], pages.shape[0]) < <Py_ssize_t>segments:
        raise IndexError(f"there are not {segments} segments")
    cdef Found found
    memset(&found, 0, sizeof(found))
    cdef Py_ssize_t slot
    cdef uint64_t handle
    cdef bint is_whole = True
    with nogil:
        for slot in range(handles.shape[0]):
            handle = handles[slot]
            if not handle:
                continue
            found.by_tag[handle & TAG_MASK] += 1
            if handle & TAG_MASK != ZERO and not count_record(&found, handle, words, segments, live, pages):
                is_whole = False
                break
    if not is_whole:
        return None
    return (
        tuple([found.by_tag[tag] for tag in range(TAGS)]), found.compressed_bytes, found.live_bytes,
        found.tier_pages, found.tier_live_bytes, found.cold_pages, found.cold_raw_pages,
    )


cdef inline bint count_record(
    Found *found, uint64_t handle, const uint64_t[::1] words, uint64_t segments, int32_t[::1] live, int32_t[::1] pages
) noexcept nogil:
    """A slot has `handle`; False if that refers to no record."""
    cdef uint64_t segment = handle >> SEGMENT_SHIFT, length = handle >> LENGTH_SHIFT & LENGTH_MASK, size = record_bytes(length)
    if segment >= segments:
        return False
    cdef uint64_t place = words[segment * WORDS_PER_SEGMENT + PLACE_WORD]
    cdef uint64_t fill = words[segment * WORDS_PER_SEGMENT + FILL_WORD] & FILL_MASK
    if place & STATE_MASK == FREE or (handle >> OFFSET_BYTES_SHIFT & OFFSET_BYTES_MASK) + size > fill:
        return False
    live[segment] += <int32_t>size
    pages[segment] += 1
    found.compressed_bytes += length
    found.live_bytes += size
    if place & STATE_MASK == ON_TIER:
        found.tier_pages += 1
        found.tier_live_bytes += size
        if place >> LANE_SHIFT & STATE_MASK == LANE_COLD:
            found.cold_pages += 1
            found.cold_raw_pages += handle & TAG_MASK == RAW
    return True
