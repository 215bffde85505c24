"""Layers of mixed precision: 2, 4 or 8 bits a weight, 4, 8 or 16 an activation, with calibrated or measured scales."""
