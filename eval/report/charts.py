"""Plots as coordinates for inline SVG: quality against time with its frontier, and seconds of every network call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from diffaccel.eval.comparison import Comparison

PERFECT = {"ssim": 1.0, "latent_error": 0.0, "lpips": 0.0}  # what the baseline is from itself
WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 560, 300, 56, 40, 16


@dataclass(frozen=True)
class Plot:
    """A plot in pixels: its axes' ticks, its points, its line."""

    title: str
    x_title: str
    y_title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    points: list[dict[str, Any]]
    line: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    bottom: int = HEIGHT - BOTTOM


def pareto(comparison: Comparison) -> list[Plot]:
    """One plot a fidelity or alignment metric: the run's value against seconds a picture."""
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
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x_low, x_high = 0.0, max(xs) * 1.15 or 1.0
    pad = (max(ys) - min(ys)) * 0.15 or abs(max(ys)) * 0.1 or 1.0
    y_low, y_high = min(ys) - pad, max(ys) + pad

    def x(value: float) -> float:
        return round(LEFT + (value - x_low) / (x_high - x_low or 1) * (WIDTH - LEFT - MARGIN), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - BOTTOM - MARGIN), 1)

    best = frontier(points, better)
    arrow = "lower" if better == "lower" else "higher"
    return Plot(
        title=key, x_title="seconds a picture", y_title=f"{key}, {arrow} is better",
        x_ticks=[(x(v), f"{v:.3g}") for v in _ticks(x_low, x_high)],
        y_ticks=[(y(v), f"{v:.3g}") for v in _ticks(y_low, y_high)],
        points=[
            {"x": x(p[0]), "y": y(p[1]), "name": p[2], "value": f"{p[1]:.4g}", "best": p in best} for p in points
        ],
        line=" ".join(f"{x(px)},{y(py)}" for px, py, _ in best),
    )  # fmt: skip


def frontier(points: list[tuple[float, float, str]], better: str) -> list[tuple[float, float, str]]:
    """The points that no other one beats in both time and quality, by time."""
    sign = 1 if better == "lower" else -1
    best: list[tuple[float, float, str]] = []
    for point in sorted(points, key=lambda p: (p[0], sign * p[1])):
        if not best or sign * point[1] < sign * best[-1][1]:
            best.append(point)
    return best


def steps(comparison: Comparison) -> list[dict[str, Any]]:
    """Milliseconds of every network call of a run, as bars of one scale."""
    found = []
    runs = (comparison.baseline, *comparison.runs)
    top = max((max(run.record.get("cost", {}).get("steps") or [0]) for run in runs), default=0)
    for run in runs:
        times = run.record.get("cost", {}).get("steps") or []
        if times and top:
            bars = [
                {"height": round(100 * t / top, 1), "text": f"call {i}: {1000 * t:.1f} ms"}
                for i, t in enumerate(times, 1)
            ]
            found.append({"run": run.name, "bars": bars, "total": f"{sum(times):.3f}"})
    return found


def _ticks(low: float, high: float) -> list[float]:
    """Four or five round numbers."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= 5)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]
