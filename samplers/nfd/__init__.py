"""Speculative frames: a round draws several frames of a video under one held action, of which the right ones stay."""
