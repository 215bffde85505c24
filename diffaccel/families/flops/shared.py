"""Shared parts of the FLOP formulas of all networks."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

Config = Mapping[str, Any]


def linears(*widths: int) -> int:
    """Count the multiply-adds of one row through linears of these widths."""
    return sum(a * b for a, b in pairwise(widths))
