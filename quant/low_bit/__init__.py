"""Layers with weights and activations of 2 to 8 bits: their format, their start from plain weights, their products."""
