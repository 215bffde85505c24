"""Temporal information blocks: what a network computes from its timestep, as tables, curves or low-bit codes."""
