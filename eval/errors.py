"""Failures inside a metric, as opposed to bad input."""

from __future__ import annotations

from diffaccel.errors import DiffAccelError


class MetricFailed(DiffAccelError):
    """An exception while measuring that no input explains."""

    exit_code = 4
