"""Measurements: each prints figures of one run, side by side with the limit or the peer."""
