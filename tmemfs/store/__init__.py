"""The store: pages by swap slot, in segments. Synchronous, no I/O: others perform its plans.

tmem                       store, load, invalidate; composes the rest and has the lock
record, codec, dictionary  layout, checksum and handle of a record; how a page is encoded
slots, segments, region    the tables, in shared memory
frames, extents            which RAM and which part of the tier is free
ledger, occupancy          everything that is counted, and the index of sparse segments
transitions, lanes         how a segment changes its state; which are open, and which leave RAM next
clean_copies               those that lie on the tier as well
append, native, compiled   appending pages, in Python and in C (constants: what C takes from Python)
plans, reclaim             what callers do outside the lock
merges, merge_plans, merge_copy, recompression   segments made dense
recovery, consistency, statistics                scan at a start; comparison with a scan; figures
damage                     damaged records that nobody has acknowledged
"""
