"""Former name of :mod:`diffaccel.eval.metrics.frechet`, for code that was written against it."""

from diffaccel.eval.metrics.frechet import Moments, between, distance

__all__ = ["Moments", "between", "distance"]
