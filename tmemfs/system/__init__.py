"""The system: what is done to this process and to the machine. Knows nothing of the store.

kernel_settings, sysctl, kworkers   settings of the machine, and how they are restored. Nothing else changes any
cpu_latency                         what idle CPUs do, and a request to keep them awake
residency                           which parts of a memfd have memory
key                                 the key of a mount, in memory that is neither swapped out nor dumped
memory, memory_safety, rlimits      locking, faulting in and releasing memory; what the process needs to go on without free memory
pressure_signals, memory_limits     how much memory is left, and what cgroups allow
swapdev, swap_watch, own_mount      loop devices, swap and mounts
in_time                             questions to a mount that may not answer
status_region, last_words           what others may read of a worker, and where its threads were
kept_mapping                        memory that stays locked without a worker
kept_settings                       what users have set, for the next worker
runtime, background, notify, log    records in /run, the start in the background, the service manager, the log
posix_signals, ownership, capabilities, proctext   signals, safe files, rights, what the kernel writes in /proc and /sys
"""
