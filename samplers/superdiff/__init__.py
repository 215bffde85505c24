"""Superposition of models and prompts by their densities (arXiv 2412.17762)."""
