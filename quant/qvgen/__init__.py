"""Quantization-aware training with a side branch that vanishes (QVGen, arXiv 2505.11497)."""
