"""Pure decisions. Time and sizes are passed in; no lock, no I/O, no import of the store.

watermarks            when the background shrinks the pool, and how far
victims               which segment leaves RAM next
clean_share           how much of RAM lies on the tier as well, and what has rested for long enough
writers               how many segments are written at once
cleaning              which segments are worth merging, and when the background merges
bursts                when requests come so fast that idle CPUs are worth keeping awake
budget                how much the cleaner may write
pressure_controller   how much the pool may hold while memory is short
"""
