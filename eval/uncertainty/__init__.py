"""Uncertainty of metrics: bootstrap and Wilson confidence intervals, and a sequential test that stops early."""
