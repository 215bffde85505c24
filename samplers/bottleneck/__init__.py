"""Fewer pixels: a call in stages of different resolution, whose rules are presets named after their sources."""
