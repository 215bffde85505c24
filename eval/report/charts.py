"""Plots as coordinates for inline SVG: quality against time with its frontier, and seconds of every network call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diffaccel.eval.comparison.result import Comparison

PERFECT = {"ssim": 1.0, "latent_error": 0.0, "lpips": 0.0, "clip_i": 1.0}  # what the baseline is from itself
WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 560, 300, 56, 40, 16
LETTER, LINE = 6.6, 13  # of a label, in pixels
COLOURS = 6  # of lines; more runs begin again


@dataclass(frozen=True)
class Plot:
    """A plot in pixels: its axes' ticks, points with their frontier, and lines."""

    title: str
    x_title: str
    y_title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    points: list[dict[str, Any]] = field(default_factory=list)
    front: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    bottom: int = HEIGHT - BOTTOM


def pareto(comparison: Comparison) -> list[Plot]:
    """One plot a metric of quality: the run's value against seconds a picture."""
    seconds = {row.run: row.value for row in comparison.rows if row.metric == "seconds" and row.value is not None}
    plots = []
    metrics = dict.fromkeys((row.key, row.better) for row in comparison.rows if row.family != "cost")
    for key, better in metrics:
        rows = [r for r in comparison.rows if r.key == key and r.value is not None and r.run in seconds]
        points = [(float(seconds[row.run] or 0), float(row.value or 0), row.run) for row in rows]
        base = comparison.baseline.name
        if rows and rows[0].metric in PERFECT and base in seconds:
            points.append((float(seconds[base] or 0), PERFECT[rows[0].metric], base))
        if len(points) < 2:
            continue
        plots.append(_plot(key, better, points))
    return plots


def _plot(key: str, better: str, points: list[tuple[float, float, str]]) -> Plot:
    axes, best = _axes([point[:2] for point in points]), frontier(points, better)
    drawn: list[dict[str, Any]] = [
        {"x": axes.x(x), "y": axes.y(y), "name": name, "value": f"{y:.4g}", "best": (x, y, name) in best}
        for x, y, name in points
    ]
    _label(drawn)
    return axes.plot(
        key, "seconds a picture", f"{key}, {better} is better", points=drawn,
        front=" ".join(f"{axes.x(x)},{axes.y(y)}" for x, y, _ in best),
    )  # fmt: skip


def _label(points: list[dict[str, Any]]) -> None:
    """Where each name stands: beside its dot, towards the middle, and below the one above it where they would touch."""
    taken: list[tuple[float, float, float]] = []
    for point in sorted(points, key=lambda p: p["y"]):
        width = LETTER * len(point["name"])
        left = point["x"] > WIDTH * 0.6
        start = point["x"] - 9 - width if left else point["x"] + 9
        y = max(point["y"] - 7, 12)
        for low, high, other in sorted(taken, key=lambda t: t[2]):
            if low < start + width and start < high and abs(other - y) < LINE:
                y = other + LINE
        taken.append((start, start + width, y))
        point |= {"label_x": point["x"] - 9 if left else point["x"] + 9, "label_y": round(y, 1), "left": left}


def frontier(points: list[tuple[float, float, str]], better: str) -> list[tuple[float, float, str]]:
    """The points that no other one beats in both time and quality, by time."""
    sign = 1 if better == "lower" else -1
    best: list[tuple[float, float, str]] = []
    for point in sorted(points, key=lambda p: (p[0], sign * p[1])):
        if not best or sign * point[1] < sign * best[-1][1]:
            best.append(point)
    return best


def steps(comparison: Comparison) -> list[dict[str, Any]]:
    """Seconds of every network call of a run as bars of one scale; short ones marked, missing ones counted."""
    times_of = comparison.steps
    top = max((max(times) for times in times_of.values() if times), default=0)
    of_baseline = len(times_of.get(comparison.baseline.name, ()))
    found = []
    for name, times in times_of.items():
        if not times or not top:
            continue
        short = short_calls(times)
        bars = [
            {
                "height": round(100 * t / top, 1),
                "short": i in short,
                "text": f"call {i + 1}: {1000 * t:.1f} ms{', short' if i in short else ''}",
            }
            for i, t in enumerate(times)
        ]
        said = f"{len(times)} calls, {sum(times):.3f} s"
        if short:
            said += f"; {len(short)} of them under a third of a full one, as cached ones are"
        if of_baseline and len(times) != of_baseline:
            said += (
                f"; {abs(of_baseline - len(times))} {'fewer' if len(times) < of_baseline else 'more'} than the baseline"
            )
        found.append({"run": name, "bars": bars, "said": said})
    return found


def short_calls(times: Sequence[float]) -> set[int]:
    """Which calls took under a third of a full one, which is the second longest: the first call may hold a warm-up."""
    full = sorted(times)[-2:][0]
    return {i for i, seconds in enumerate(times) if seconds < full / 3}


def curves(comparison: Comparison) -> list[Plot]:
    """One plot a metric: the mean over videos of every frame, a line a run."""
    plots = []
    for key, by in comparison.curves.items():
        lines = {
            name: [(float(t), v) for t, v in enumerate(curve.tolist()) if math.isfinite(v)]
            for name, curve in by.items()
        }
        lines = {name: points for name, points in lines.items() if points}
        if not lines:
            continue
        axes = _axes([p for points in lines.values() for p in points])
        drawn = [
            {"name": name, "path": " ".join(f"{axes.x(a)},{axes.y(b)}" for a, b in points), "colour": i % COLOURS}
            for i, (name, points) in enumerate(lines.items())
        ]
        plots.append(axes.plot(key, "frame", f"{key} by frame", lines=drawn))
    return plots


@dataclass(frozen=True)
class _Axes:
    """From numbers to pixels."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return round(LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - MARGIN), 1)

    def y(self, value: float) -> float:
        return round(
            HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - BOTTOM - MARGIN), 1
        )

    def plot(self, title: str, x_title: str, y_title: str, **drawn: Any) -> Plot:
        return Plot(
            title=title, x_title=x_title, y_title=y_title,
            x_ticks=[(self.x(v), f"{v:.4g}") for v in _ticks(self.x_low, self.x_high)],
            y_ticks=[(self.y(v), f"{v:.4g}") for v in _ticks(self.y_low, self.y_high)],
            **drawn,
        )  # fmt: skip


def _axes(points: Sequence[tuple[float, float]]) -> _Axes:
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    pad = (max(ys) - min(ys)) * 0.15 or abs(max(ys)) * 0.1 or 1.0
    return _Axes(0.0, max(xs) * 1.15 or 1.0, min(ys) - pad, max(ys) + pad)


def _ticks(low: float, high: float) -> list[float]:
    """Four or five round numbers."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= 5)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]
