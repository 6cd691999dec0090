"""Tiers: where segments are written to when they leave RAM. Knows nothing of slots, records and codecs.

tier        the protocol: what a new tier has to do
watched     counts the calls of another tier
file        a sparse file or a block device
blocks      who may write to a file, and who may change which of its blocks are allocated
encrypted   any tier, encrypted at rest
in_memory   for tests, and for a pool without a backing
"""
