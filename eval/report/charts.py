"""Plots as coordinates for inline SVG: quality against speed with its Pareto front, and curves over frames."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffaccel.eval.comparison import verdict
from diffaccel.eval.comparison.row import BY_PROMPT
from diffaccel.eval.comparison.text import of_things
from diffaccel.eval.comparison.verdict import Row
from diffaccel.eval.report.axes import BOTTOM, LEFT, Axes, Plot, padded
from diffaccel.eval.report.labels import place_names
from diffaccel.eval.report.names import clean
from diffaccel.eval.report.summary import main_keys, things_of

PERFECT = {"ssim": 1.0, "latent_error": 0.0, "lpips": 0.0, "clip_i": 1.0}  # values of equal pictures
WIDE, NARROW, SMALL = (600, 330), (330, 330), (330, 250)  # of the first plot on a screen and a phone, of the others
COLOURS = 6  # of lines; further runs take the first ones again
Ends = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """A run in a plot: its speed and its quality, each with an interval where there is one."""

    x: float
    y: float
    name: str
    x_ends: Ends | None = None
    y_ends: Ends | None = None


@dataclass(frozen=True)
class Speed:
    """The lower axis: what it shows of a run, and in which direction it is better."""

    title: str
    unit: str
    metric: str
    better: str


RATIO = Speed("speed-up over the baseline", "x", "speedup", "higher")
SECONDS = Speed("seconds a picture", "", "seconds", "lower")


def first_plots(report: Mapping[str, Any]) -> list[Plot]:
    """Plot the main measure of quality against speed, for a wide screen and for a phone; none without times."""
    plots = [quality_plot(report, key, WIDE) for key in main_keys(report)]
    key = next((key for key, plot in zip(main_keys(report), plots, strict=True) if plot is not None), None)
    return [plot for size in (WIDE, NARROW) if key and (plot := quality_plot(report, key, size)) is not None]


def quality_plots(report: Mapping[str, Any]) -> list[Plot]:
    """Plot every other metric of quality against speed."""
    shown = {plot.title for plot in first_plots(report)}
    keys = dict.fromkeys(row["key"] for row in report["metrics"] if row["family"] != "cost")
    plots = [quality_plot(report, key, SMALL) for key in keys if key not in shown]
    return [plot for plot in plots if plot is not None]


def quality_plot(report: Mapping[str, Any], key: str, size: tuple[int, int]) -> Plot | None:
    """Plot a metric against speed, a point for every run; None where fewer than two runs have both.

    A metric with differences to the baseline shows these, with the baseline at 0 and other seeds as a band.
    """
    rows = [row for row in report["metrics"] if row["key"] == key]
    differs = any(row.get("delta") is not None for row in rows)
    by_ratio = any(row["metric"] == "speedup" and row.get("value") for row in report["metrics"])
    speed, baseline = RATIO if by_ratio else SECONDS, report["baseline"]
    speed = replace(speed, title=of_things(speed.title, things_of(report)))
    speeds = _speeds(report, speed)
    points = []
    for row in rows:
        value, interval = _shown(row, differs)
        if value is not None and row["run"] in speeds and row["run"] != baseline:
            points.append(Point(speeds[row["run"]][0], value, row["run"], speeds[row["run"]][1], interval))
    start = _baseline_value(rows, baseline, differs)
    if start is not None and baseline in speeds:
        points.append(Point(speeds[baseline][0], start[0], baseline, None, start[1]))
    if len(points) < 2:
        return None
    with_delta = next((row for row in rows if row.get("delta") is not None), rows[0])  # it has the noise of seeds
    return draw(points, with_delta, speed, size, differs=differs)


def draw(points: Sequence[Point], row: Row, speed: Speed, size: tuple[int, int], *, differs: bool = False) -> Plot:
    """Draw points with their error bars and names, those of the Pareto front filled and joined by a line."""
    xs = [x for point in points for x in (point.x, *(point.x_ends or ()))]
    ys = [y for point in points for y in (point.y, *(point.y_ends or ()))]
    noise = _noise(row) if differs else None
    log = speed.metric == RATIO.metric
    x_range = (min(xs) / 1.12, max(xs) * 1.25) if log else (0.0, max(xs) * 1.2 or 1.0)
    axes = Axes(x_range, padded(ys, 0.16), *size, log=log)
    front = pareto_front(points, row["better"], speed.better)
    dots = [_dot(axes, point, row, speed, best=point in front) for point in points]
    line = [(axes.x(point.x), axes.y(point.y)) for point in front]
    unnamed = place_names(dots, (LEFT + 2, 2, size[0] - 2, size[1] - BOTTOM - 1), line)
    what = f"{clean(row['key'])}{', difference to the baseline' if differs else ''}"
    unit = f", {row['unit']}" if row.get("unit") else ""
    return axes.plot(
        row["key"], f"{speed.title}, {speed.better} is better", f"{what}{unit}, {row['better']} is better",
        x_unit=speed.unit, points=dots, unnamed=[clean(name) for name in unnamed], band=_band(axes, noise),
        front=" ".join(f"{x},{y}" for x, y in line),
    )  # fmt: skip


def pareto_front(points: Sequence[Point], better: str, faster: str = "lower") -> list[Point]:
    """Return the points that no other one beats in both speed and quality, the fastest first."""
    sign, speed = (1 if direction == "lower" else -1 for direction in (better, faster))
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (speed * p.x, sign * p.y)):
        if not front or sign * point.y < sign * front[-1].y:
            front.append(point)
    return front


def curves(report: Mapping[str, Any]) -> list[Plot]:
    """Plot every metric's mean over videos against the frame, a line for every run."""
    plots = []
    for key, by_run in (report.get("curves") or {}).items():
        lines = {
            name: [(float(frame), y) for frame, y in enumerate(curve) if y is not None]
            for name, curve in by_run.items()
        }
        lines = {name: points for name, points in lines.items() if points}
        if not lines:
            continue
        frames = [x for points in lines.values() for x, _ in points]
        heights = [y for points in lines.values() for _, y in points]
        axes = Axes((0.0, max(frames) * 1.05 or 1.0), padded(heights), *SMALL)
        paths = [
            {
                "name": clean(name),
                "path": " ".join(f"{axes.x(x)},{axes.y(y)}" for x, y in points),
                "colour": i % COLOURS,
            }
            for i, (name, points) in enumerate(lines.items())
        ]
        plots.append(axes.plot(key, "frame", f"{clean(key)} by frame", lines=paths))
    return plots


# -- points -----------------------------------------------------------------------------------------------------------


def _speeds(report: Mapping[str, Any], speed: Speed) -> dict[str, tuple[float, Ends | None]]:
    """Return by run its speed and its interval; a ratio of the baseline's is 1."""
    found: dict[str, tuple[float, Ends | None]] = (
        {report["baseline"]: (1.0, None)} if speed.metric == RATIO.metric else {}
    )
    for row in report["metrics"]:
        if row["metric"] == speed.metric and row.get("value"):
            found[row["run"]] = float(row["value"]), _ends(row.get("interval"))
    return found


def _shown(row: Row, differs: bool) -> tuple[float | None, Ends | None]:
    """Return the number that a plot shows of a row, and its interval."""
    if row.get("identical") and row["metric"] in PERFECT:
        return PERFECT[row["metric"]], None
    value, interval = ("delta", "delta_interval") if differs else ("value", "interval")
    return row.get(value), _ends(row.get(interval))


def _baseline_value(rows: Sequence[Row], baseline: str, differs: bool) -> tuple[float, Ends | None] | None:
    """Return the baseline's own number and interval: 0 of differences, its row's, or that of equal pictures."""
    if differs:
        return 0.0, None
    own = next((row for row in rows if row["run"] == baseline and row.get("value") is not None), None)
    if own is not None:
        return own["value"], _ends(own.get("interval"))
    metric = rows[0]["metric"] if rows else ""
    return (PERFECT[metric], None) if metric in PERFECT else None


def _ends(interval: Mapping[str, Any] | None) -> Ends | None:
    return None if interval is None else (float(interval["low"]), float(interval["high"]))


def _dot(axes: Axes, point: Point, row: Row, speed: Speed, *, best: bool) -> dict[str, Any]:
    """Return a point in pixels with the ends of its error bars, and all of it in words."""
    places = verdict.number(row, point.y)
    words = f"{places}{_bracketed(point.y_ends, row)} at {point.x:.4g}{speed.unit}"
    if point.x_ends:
        words += f" ({point.x_ends[0]:.4g} to {point.x_ends[1]:.4g})"
    return {
        "x": axes.x(point.x), "y": axes.y(point.y), "name": clean(point.name), "value": words, "best": best,
        "x_bar": None if point.x_ends is None else tuple(axes.x(end) for end in point.x_ends),
        "y_bar": None if point.y_ends is None else tuple(axes.y(end) for end in reversed(point.y_ends)),
    }  # fmt: skip


def _bracketed(ends: Ends | None, row: Row) -> str:
    return "" if ends is None else f" ({verdict.number(row, ends[0])} to {verdict.number(row, ends[1])})"


def _noise(row: Row) -> float | None:
    """Return how far from the baseline other seeds are."""
    interval = verdict.noise_interval(row)
    if interval is not None:
        return max(abs(end) for end in interval)
    value = verdict.floor(row)[0]
    return None if value is None or row["family"] not in BY_PROMPT else abs(value)


def _band(axes: Axes, noise: float | None) -> tuple[float, float] | None:
    """Return top and height of what other seeds do, inside the plot."""
    if noise is None or not math.isfinite(noise):
        return None
    low, high = (min(max(end, axes.y_range[0]), axes.y_range[1]) for end in (-noise, noise))
    return axes.y(high), round(axes.y(low) - axes.y(high), 1)
