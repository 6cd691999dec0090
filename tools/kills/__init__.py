"""Kills of the worker under load, with every byte verified and every stall measured. Run by `make kills`.

__main__ (the course of a run), worker (finding and ending a worker), phases (what a worker is doing when it dies), prober (the
stalls), targets (the two mounts), load (programs that verify what they wrote), machine_checks (the kernel's log, processes that
hang), upgrades (the command under load), deaths (what a run counted, as a table).
"""
