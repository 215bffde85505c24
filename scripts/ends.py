"""How benches keep an interval in a record, and how their tables show it."""

from __future__ import annotations

from diffaccel.eval.uncertainty.intervals import Interval


def ends(interval: Interval) -> list[float]:
    """Return the value and both ends for a record."""
    return [float(interval.value), float(interval.low), float(interval.high)]


def ends_text(values: list[float] | None, factor: float = 1.0, sign: str = "") -> str:
    """Return a value and both ends with two decimals, "" for None.

    Args:
        values: of :func:`ends`.
        factor: that they are multiplied by, 100 for per cent.
        sign: "+" where positive numbers get theirs.
    """
    if values is None:
        return ""
    value, low, high = (factor * v for v in values)
    return f"{value:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"
