"""Former name of :mod:`diffaccel.eval.networks.tiny_network`, for code that was written against it."""

from diffaccel.eval.networks.tiny_network import TinyNetwork, load_tiny

__all__ = ["TinyNetwork", "load_tiny"]
