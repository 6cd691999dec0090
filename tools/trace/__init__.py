"""Traces: what a swapping workload asks of the pager, recorded slot by slot, and played again to judge a policy."""
