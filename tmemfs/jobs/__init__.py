"""Jobs: what goes on in the background, and what it is made of. Knows nothing of FUSE, control files and the command.

supervision                              starts, watches and restarts jobs
notices, executor, stop, throttle        how jobs are woken, block, end early and yield
pulse                                    every two seconds: the event loop runs, and what the store holds
pool_size, limits                        what the pool may hold, and what a user sets
shrinker, reserve, holes, full_tier, shrink_request   write back and release; frames ahead of need; extents freed
write_ahead                              segments that stay in RAM are written, too
left_frames                              memory that an earlier worker left
cleaner, merger, recompressor, compact_request        when to merge, and the merge itself
single_pages                             requests of one page after damage
pressure, swap_stall, kernel_tuning      memory pressure, and settings of the kernel
latency                                  idle CPUs are kept awake in bursts
"""
