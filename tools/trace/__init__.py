"""Traces: the requests of a swapping workload to the pager, recorded slot by slot, and replayed to judge a policy."""
