"""Loom: locks, instances and shared state for many AI agents, on nothing but PostgreSQL."""

__version__ = "0.1.0"
