"""Shared state: providers, projects, agents, beads and config that many agents and instances change at once."""
