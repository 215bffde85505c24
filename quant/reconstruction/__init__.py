"""Learned rounding of a quantized network, block after block, on calls of its own (BRECQ, arXiv 2102.05426)."""
