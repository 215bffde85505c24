"""Axes of the plots: ranges, round ticks, and the way from numbers to pixels; linear, or logarithmic for ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

LEFT, BOTTOM, MARGIN = 52, 44, 14


@dataclass(frozen=True)
class Plot:
    """A plot in pixels: ticks of its axes, points with their error bars and Pareto front, lines, and a band of noise.

    Attributes:
        title: of the plot.
        x_title, y_title: of the axes, with units.
        width, height: of the drawing; names are placed for this size.
        x_ticks, y_ticks: places and texts.
        points: by :mod:`diffaccel.eval.report.charts`.
        front: the line through the points that no other one beats in both.
        lines: by name, path and colour.
        band: top and height of what other seeds do; None where that was not measured.
        unnamed: names of points for which there was no room.
    """

    title: str
    x_title: str
    y_title: str
    width: int
    height: int
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    points: list[dict[str, Any]] = field(default_factory=list)
    front: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)
    band: tuple[float, float] | None = None
    unnamed: list[str] = field(default_factory=list)
    left: int = LEFT
    margin: int = MARGIN

    @property
    def bottom(self) -> int:
        """Height of the lower axis."""
        return self.height - BOTTOM

    @property
    def right(self) -> int:
        """Place of the right end of the lower axis."""
        return self.width - MARGIN


@dataclass(frozen=True)
class Axes:
    """Axes of a plot: the ranges of both, the size of the drawing, and whether the lower one is logarithmic."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: int
    height: int
    log: bool = False

    def x(self, value: float) -> float:
        """Return the place of a value of the lower axis, in pixels."""
        low, high, value = (math.log(v) if self.log else v for v in (*self.x_range, value))
        return round(LEFT + (value - low) / (high - low) * (self.width - LEFT - MARGIN), 1)

    def y(self, value: float) -> float:
        """Return the height of a value of the left axis, in pixels from above."""
        low, high = self.y_range
        return round(self.height - BOTTOM - (value - low) / (high - low) * (self.height - BOTTOM - MARGIN), 1)

    def plot(self, title: str, x_title: str, y_title: str, *, x_unit: str = "", **content: Any) -> Plot:
        """Return the plot with its ticks."""
        few = 4 if self.width < 480 else 6
        x_ticks = log_ticks(*self.x_range, few) if self.log else ticks(*self.x_range, few)
        return Plot(
            title=title, x_title=x_title, y_title=y_title, width=self.width, height=self.height,
            x_ticks=[(self.x(v), f"{v:.4g}{x_unit}") for v in x_ticks],
            y_ticks=[(self.y(v), f"{v:.4g}".replace("-", "−")) for v in ticks(*self.y_range)],
            **content,
        )  # fmt: skip


def padded(values: Sequence[float], share: float = 0.12) -> tuple[float, float]:
    """Return a range that holds values with some room around them."""
    low, high = min(values), max(values)
    pad = (high - low) * share or abs(high) * share or 1.0
    return low - pad, high + pad


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return up to ``most`` or one more round numbers of a range."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(step * k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= most)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers of a range of ratios, at most ``most``; those of a linear axis where it spans little."""
    if high / low < 2.5:
        return ticks(low, high, most)
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [round(d * 10**power, 10) for power in powers for d in digits if low <= d * 10**power <= high]
        if len(found) <= most:
            return found
    return found
