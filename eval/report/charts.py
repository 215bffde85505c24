"""Plots as coordinates for inline SVG: quality against time with its Pareto front, and times of network calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diffaccel.eval.comparison.result import Comparison

PERFECT = {"ssim": 1.0, "latent_error": 0.0, "lpips": 0.0, "clip_i": 1.0}  # values of equal pictures
WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 560, 300, 56, 40, 16
LETTER, LINE = 6.6, 13  # of a label, in pixels
COLOURS = 6  # of lines; further runs take the first ones again


@dataclass(frozen=True)
class Plot:
    """A plot in pixels: ticks of its axes, points with their Pareto front, and lines."""

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
    """Plot every metric of quality against seconds a picture, a point for every run."""
    seconds = {row.run: row.value for row in comparison.rows if row.metric == "seconds" and row.value is not None}
    plots = []
    metrics = dict.fromkeys((row.key, row.better) for row in comparison.rows if row.family != "cost")
    for key, better in metrics:
        rows = [row for row in comparison.rows if row.key == key and row.value is not None and row.run in seconds]
        points = [(float(seconds[row.run] or 0), float(row.value or 0), row.run) for row in rows]
        baseline = comparison.baseline.name
        if rows and rows[0].metric in PERFECT and baseline in seconds:
            points.append((float(seconds[baseline] or 0), PERFECT[rows[0].metric], baseline))
        if len(points) < 2:
            continue
        plots.append(quality_plot(key, better, points))
    return plots


def quality_plot(key: str, better: str, points: list[tuple[float, float, str]]) -> Plot:
    """Plot points of seconds, value and name, those of the Pareto front marked and joined by a line."""
    axes, front = _axes([point[:2] for point in points]), pareto_front(points, better)
    dots: list[dict[str, Any]] = [
        {"x": axes.x(x), "y": axes.y(y), "name": name, "value": f"{y:.4g}", "best": (x, y, name) in front}
        for x, y, name in points
    ]
    _place_labels(dots)
    return axes.plot(
        key, "seconds a picture", f"{key}, {better} is better", points=dots,
        front=" ".join(f"{axes.x(x)},{axes.y(y)}" for x, y, _ in front),
    )  # fmt: skip


def _place_labels(dots: list[dict[str, Any]]) -> None:
    """Place each name beside its dot, towards the middle, and below the name above it where they would touch."""
    placed: list[tuple[float, float, float]] = []  # left end, right end and height of each label
    for dot in sorted(dots, key=lambda dot: dot["y"]):
        width = LETTER * len(dot["name"])
        left = dot["x"] > WIDTH * 0.6
        start = dot["x"] - 9 - width if left else dot["x"] + 9
        y = max(dot["y"] - 7, 12)
        for low, high, other_y in sorted(placed, key=lambda label: label[2]):
            if low < start + width and start < high and abs(other_y - y) < LINE:
                y = other_y + LINE
        placed.append((start, start + width, y))
        dot |= {"label_x": dot["x"] - 9 if left else dot["x"] + 9, "label_y": round(y, 1), "left": left}


def pareto_front(points: list[tuple[float, float, str]], better: str) -> list[tuple[float, float, str]]:
    """Return the points that no other one beats in both time and quality, by time."""
    sign = 1 if better == "lower" else -1
    front: list[tuple[float, float, str]] = []
    for point in sorted(points, key=lambda p: (p[0], sign * p[1])):
        if not front or sign * point[1] < sign * front[-1][1]:
            front.append(point)
    return front


def steps(comparison: Comparison) -> list[dict[str, Any]]:
    """Return seconds of every network call of a run as bars on one scale, short ones marked, with a summary."""
    baseline_calls = len(comparison.steps.get(comparison.baseline.name, ()))
    longest = max((max(times) for times in comparison.steps.values() if times), default=0)
    charts = []
    for name, times in comparison.steps.items():
        if not times or not longest:
            continue
        short = short_calls(times)
        bars = [
            {
                "height": round(100 * seconds / longest, 1),
                "short": i in short,
                "text": f"call {i + 1}: {1000 * seconds:.1f} ms{', short' if i in short else ''}",
            }
            for i, seconds in enumerate(times)
        ]
        charts.append({"run": name, "bars": bars, "summary": _steps_summary(times, len(short), baseline_calls)})
    return charts


def _steps_summary(times: Sequence[float], short: int, baseline_calls: int) -> str:
    text = f"{len(times)} calls, {sum(times):.3f} s"
    if short:
        text += f"; {short} of them under a third of a full one, as cached ones are"
    if baseline_calls and len(times) != baseline_calls:
        word = "fewer" if len(times) < baseline_calls else "more"
        text += f"; {abs(baseline_calls - len(times))} {word} than the baseline"
    return text


def short_calls(times: Sequence[float]) -> set[int]:
    """Return the calls that took under a third of a full one.

    The second longest call counts as a full one, since the first call may hold a warm-up.
    """
    full = sorted(times)[-2:][0]
    return {i for i, seconds in enumerate(times) if seconds < full / 3}


def curves(comparison: Comparison) -> list[Plot]:
    """Plot every metric's mean over videos against the frame, a line for every run."""
    plots = []
    for key, by_run in comparison.curves.items():
        lines = {
            name: [(float(frame), y) for frame, y in enumerate(curve.tolist()) if math.isfinite(y)]
            for name, curve in by_run.items()
        }
        lines = {name: points for name, points in lines.items() if points}
        if not lines:
            continue
        axes = _axes([point for points in lines.values() for point in points])
        paths = [
            {"name": name, "path": " ".join(f"{axes.x(x)},{axes.y(y)}" for x, y in points), "colour": i % COLOURS}
            for i, (name, points) in enumerate(lines.items())
        ]
        plots.append(axes.plot(key, "frame", f"{key} by frame", lines=paths))
    return plots


@dataclass(frozen=True)
class _Axes:
    """Axes of a plot: the ranges of both, and the way from numbers to pixels."""

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

    def plot(self, title: str, x_title: str, y_title: str, **content: Any) -> Plot:
        return Plot(
            title=title, x_title=x_title, y_title=y_title,
            x_ticks=[(self.x(v), f"{v:.4g}") for v in _ticks(self.x_low, self.x_high)],
            y_ticks=[(self.y(v), f"{v:.4g}") for v in _ticks(self.y_low, self.y_high)],
            **content,
        )  # fmt: skip


def _axes(points: Sequence[tuple[float, float]]) -> _Axes:
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    pad = (max(ys) - min(ys)) * 0.15 or abs(max(ys)) * 0.1 or 1.0
    return _Axes(0.0, max(xs) * 1.15 or 1.0, min(ys) - pad, max(ys) + pad)


def _ticks(low: float, high: float) -> list[float]:
    """Return four or five round numbers of a range."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= 5)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]
