"""Former name of :mod:`diffaccel.runs.generate`, for code that was written against it."""

from diffaccel.runs.generate import generate_run

__all__ = ["generate_run"]
