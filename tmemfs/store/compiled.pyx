# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The two functions that every stored page goes through, compiled: `encode_lz4` (codec.py) and `Appender.append` (append.py).

They do what their pure-Python namesakes do, which stay, and are used where this was not built; tests hold the two against each
other. lz4 and xxhash are called directly: a batch is compressed without the interpreter's lock. The order of a store (record,
fill, handle) is kept by releasing stores, which neither compiler nor processor moves.
"""

import sys

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from tmemfs.store import codec, record, segments
from tmemfs.store import append
from tmemfs.units import BLOCK_BYTES, PAGE_BYTES, SEGMENT_BYTES

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

cdef enum:
    #: append.REVISION of what this was written after.
    REVISION = 2
    PAGE = 4096
    BLOCK = 4096
    SEGMENT = 1 << 20
    #: Pages that are compressed before the interpreter's lock is taken again; their payloads lie on the stack.
    GROUP = 8
    LARGEST = 3900
    HEADER = 12
    ZERO_TAG = 1
    RAW_TAG = 2
    FILL_TAG = 3
    LZ4_TAG = 4
    TAGS = 8
    LENGTH_AT = 3
    OFFSET_AT = 14
    SEGMENT_AT = 34
    LENGTHS = 0x1FFF
    GRAIN = 4
    #: Of a segment's record in its table: words, and which of them is the fill.
    RECORD_WORDS = 4
    FILL_WORD = 1
    LANES = 2

cdef uint64_t CHECKSUM = 0xFFFF_FFFF_FFFF_0000


def _same_constants():
    """What is written out above is what the modules say."""
    ours = (PAGE, BLOCK, SEGMENT, LARGEST, HEADER, GRAIN, ZERO_TAG, RAW_TAG, FILL_TAG, LZ4_TAG, TAGS - 1, LENGTH_AT, OFFSET_AT,
            SEGMENT_AT, LENGTHS, CHECKSUM, RECORD_WORDS * 8, REVISION)
    theirs = (PAGE_BYTES, BLOCK_BYTES, SEGMENT_BYTES, codec.LARGEST_COMPRESSED_BYTES, record.RECORD_HEADER_BYTES, record.GRAIN_BYTES,
              codec.ZERO, codec.RAW, codec.FILL, codec.LZ4, record.TAG_MASK, record.LENGTH_SHIFT, record.OFFSET_BYTES_SHIFT,
              record.SEGMENT_SHIFT, record.LENGTH_MASK, record.CHECKSUM_MASK, segments.RECORD_BYTES, append.REVISION)
    if ours != theirs or sys.byteorder != "little":
        raise ImportError("compiled from another version of tmemfs, or for a big-endian machine: run 'make setup' again")


_same_constants()
cdef tuple ZERO_PACKED = (ZERO_TAG, b"")


def encode_lz4(const unsigned char[::1] pages not None):
    """(tag, payload) of every page in `pages`, whose length is a multiple of PAGE_BYTES."""
    cdef char payloads[GROUP][LARGEST]
    cdef int sizes[GROUP]
    cdef list packed = []
    cdef Py_ssize_t first, at, count = pages.shape[0] // PAGE
    cdef const char *page
    cdef int many
    for first in range(0, count, GROUP):
        page = <const char *>&pages[first * PAGE]
        many = <int>min(count - first, GROUP)
        with nogil:
            for at in range(many):
                sizes[at] = -1 if is_filled(page + at * PAGE) else LZ4_compress_default(page + at * PAGE, payloads[at], PAGE, LARGEST)
        for at in range(many):
            if sizes[at] > 0:
                packed.append((LZ4_TAG, PyBytes_FromStringAndSize(payloads[at], sizes[at])))
            elif sizes[at] == 0:
                packed.append((RAW_TAG, PyBytes_FromStringAndSize(page + at * PAGE, PAGE)))
            elif (<const uint64_t *>(page + at * PAGE))[0]:
                packed.append((FILL_TAG, PyBytes_FromStringAndSize(page + at * PAGE, 8)))
            else:
                packed.append(ZERO_PACKED)
    return packed


cdef bint is_filled(const char *page) noexcept nogil:
    """Whether one word is repeated all over `page`: then it equals itself moved by a word."""
    return memcmp(page, page + PAGE - 8, 8) == 0 and memcmp(page, page + 8, PAGE - 8) == 0


#: A lane's open segment, as lanes.Lane has it.
cdef struct Open:
    bint is_known
    uint64_t segment
    uint64_t base
    uint64_t fill
    uint64_t seed


#: What a call has changed and the store has not been told of yet.
cdef struct Changes:
    Open lanes[LANES]
    int64_t by_tag[TAGS]
    int64_t compressed_bytes
    int64_t live_bytes
    int64_t stored_bytes
    int64_t raw_stores


cdef class Appender:
    """Stores encoded pages in `tmem`. Guarded by its lock."""

    cdef object _tmem
    cdef uint64_t _slots
    cdef uint64_t[::1] _handles
    cdef uint64_t[::1] _words
    cdef unsigned char[::1] _arena
    cdef int64_t[::1] _base
    cdef int32_t[::1] _live
    cdef int32_t[::1] _pages
    cdef int32_t[::1] _floor

    def __init__(self, tmem):
        self._tmem = tmem
        self._slots = tmem.slots.count
        self._handles = tmem.slots.handles
        self._words = tmem.segments.words
        self._arena = tmem.arena.view
        self._base = tmem.segments.base
        self._live = tmem.segments.live
        self._pages = tmem.segments.pages
        self._floor = tmem.occupancy.floor

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
                if len(entry) != 2 or not ZERO_TAG <= entry[0] < TAGS:
                    raise TypeError(f"a tag and a payload are wanted, not {entry}")
                if not self._store(&changes, first + number, entry[0], <bytes?>entry[1]):
                    break
                number += 1
        finally:
            self._note(&changes, number - start)
        return number

    cdef bint _store(self, Changes *changes, uint64_t slot, int tag, bytes payload) except -1:
        """Store one page; False if there is no frame for it."""
        if len(payload) > PAGE:
            raise ValueError(f"a payload of {len(payload)} bytes is longer than a page")
        cdef uint64_t handle = ZERO_TAG, at, end, word, length = PyBytes_GET_SIZE(payload)
        cdef uint32_t owner = <uint32_t>slot
        cdef const char *data = PyBytes_AS_STRING(payload)
        cdef unsigned char *into
        cdef Open *lane = &changes.lanes[tag == RAW_TAG]
        if tag != ZERO_TAG:
            if not lane.is_known:
                self._know(lane, tag == RAW_TAG)
            at = lane.fill
            if tag == RAW_TAG and at % BLOCK + HEADER + length > 2 * BLOCK:
                at = (at + BLOCK - 1) // BLOCK * BLOCK
            end = at + HEADER + length
            if end > SEGMENT:
                if not self._open_next(lane, tag == RAW_TAG):
                    return False
                at, end = 0, HEADER + length
            elif at != lane.fill:
                memset(&self._arena[lane.base + lane.fill], 0, 4)
            into = &self._arena[lane.base + at]
            word = XXH3_64bits_withSeed(data, length, lane.seed | <uint64_t>tag << 32 | slot) & CHECKSUM
            word |= length << LENGTH_AT | tag
            memcpy(into, &word, 8)
            memcpy(into + 8, &owner, 4)
            memcpy(into + HEADER, data, length)
            end = (end + GRAIN - 1) // GRAIN * GRAIN
            lane.fill = end
            store_release(&self._words[lane.segment * RECORD_WORDS + FILL_WORD], end)
            self._live[lane.segment] += <int32_t>(end - at)
            self._pages[lane.segment] += 1
            changes.live_bytes += end - at
            changes.compressed_bytes += length
            changes.stored_bytes += length
            changes.raw_stores += tag == RAW_TAG
            handle = tag | length << LENGTH_AT | at << OFFSET_AT | lane.segment << SEGMENT_AT
        cdef uint64_t old = self._handles[slot]
        store_release(&self._handles[slot], handle)
        changes.by_tag[tag] += 1
        if old:
            self._drop(changes, old)
        return True

    cdef int _drop(self, Changes *changes, uint64_t old) except -1:
        """A slot does not refer to the record of `old` any more; what has consequences is left to Tmem.drop."""
        cdef uint64_t length = old >> LENGTH_AT & LENGTHS, segment = old >> SEGMENT_AT
        cdef int tag = old & (TAGS - 1)
        cdef int32_t size = <int32_t>((HEADER + length + GRAIN - 1) // GRAIN * GRAIN)
        if tag != ZERO_TAG:
            if self._base[segment] < 0 or self._live[segment] == size or self._live[segment] - size < self._floor[segment]:
                self._tmem.drop(old)
                return 0
            self._live[segment] -= size
            self._pages[segment] -= 1
            changes.live_bytes -= size
            changes.compressed_bytes -= length
        changes.by_tag[tag] -= 1
        return 0

    cdef int _know(self, Open *lane, int index) except -1:
        """Take over where the lane's open segment is."""
        python = self._tmem.lanes[index]
        lane.segment = python.segment
        lane.base = python.base
        lane.fill = python.fill
        lane.seed = python.seed
        lane.is_known = True
        return 0

    cdef bint _open_next(self, Open *lane, int index) except -1:
        """Have the lane open another segment; False if there is no frame."""
        python = self._tmem.lanes[index]
        python.fill = lane.fill
        lane.is_known = False
        if not self._tmem.open_next(python):
            return False
        self._know(lane, index)
        return True

    cdef int _note(self, Changes *changes, Py_ssize_t stores) except -1:
        """Tell the store what has changed."""
        tmem, counts = self._tmem, self._tmem.counts
        cdef int index
        for index in range(LANES):
            if changes.lanes[index].is_known:
                tmem.lanes[index].fill = changes.lanes[index].fill
        pages_by_tag = tmem.pages_by_tag
        for index in range(TAGS):
            if changes.by_tag[index]:
                pages_by_tag[index] += changes.by_tag[index]
        tmem.compressed_bytes += changes.compressed_bytes
        tmem.live_bytes += changes.live_bytes
        counts.stored_bytes += changes.stored_bytes
        counts.raw_stores += changes.raw_stores
        counts.stores += stores
        return 0
