"""Kills of the worker under load, with every byte verified and every stall measured. Run by `make kills`.

__main__ (the command), run (the course of a run), targets (the two mounts), load (programs that verify what they wrote), worker
(finding and ending a worker), strikes (one or two deaths and their stall), phases (what a worker is doing when it dies), upgrades
(the command under load), prober (page requests and how long they wait), machine_checks (the kernel's log, processes that hang),
deaths (what a run counted, as a table).
"""
