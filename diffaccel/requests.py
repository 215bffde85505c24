"""Former name of :mod:`diffaccel.runs.request`, for code that was written against it."""

from diffaccel.runs.request import Item, Request

__all__ = ["Item", "Request"]
