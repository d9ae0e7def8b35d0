"""Compare defences: a suite of baselines under one ladder, cached entry by entry, on one machine or many."""

from bitquorum.bench.pools import Place
from bitquorum.bench.run import bench, is_bench, stored_suite, summary
from bitquorum.bench.suite import Entry, Suite, read_suite

__all__ = ["Entry", "Place", "Suite", "bench", "is_bench", "read_suite", "stored_suite", "summary"]
