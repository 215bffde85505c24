"""Replacing, hooking and recording a network."""
