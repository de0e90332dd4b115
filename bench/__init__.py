"""Benchmarks: each prints the figures of one run, beside those of the limit or of another system."""
