"""What goes wrong inside a metric, as opposed to its input."""

from __future__ import annotations

from diffaccel.errors import DiffAccelError


class MetricFailed(DiffAccelError):
    """Something raised while measuring that no input explains."""

    exit_code = 4
