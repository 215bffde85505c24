"""Quality plots: the frontier, ticks, error bars, and names that touch nothing."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest

from diffaccel.eval.report import axes, charts, labels
from diffaccel.eval.report.charts import Point


def row(**more):
    return {"metric": "ssim", "key": "SSIM", "family": "fidelity", "better": "higher", "run": "x", **more}


@pytest.mark.parametrize(
    ("better", "names"),
    [("higher", ["fast", "good"]), ("lower", ["fast"])],
)
def test_frontier(better, names):
    points = [
        Point(1.0, 0.5, "fast"),
        Point(2.0, 0.9, "good"),
        Point(3.0, 0.8, "slow"),
        Point(1.0, 0.4 if better == "higher" else 0.6, "worse"),
    ]
    assert [point.name for point in charts.pareto_front(points, better)] == names
    ratios = [Point(1 / point.x, point.y, point.name) for point in points]
    assert [point.name for point in charts.pareto_front(ratios, better, "higher")] == names


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2, 4.7), (0.997, 0.9991), (0, 12345.0)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = axes.ticks(low, high)
    assert 2 <= len(ticks) <= 6 and low <= ticks[0] and ticks[-1] <= high
    steps = {round(b - a, 9) for a, b in pairwise(ticks)}
    assert len(steps) == 1


@pytest.mark.parametrize(("low", "high"), [(0.9, 1.3), (0.8, 4.5), (0.02, 30.0), (1.0, 1.001)])
def test_ticks_of_ratios_are_few_and_inside(low, high):
    ticks = axes.log_ticks(low, high, 6)
    assert 1 <= len(ticks) <= 7 and low <= ticks[0] and ticks[-1] <= high and ticks == sorted(set(ticks))


def test_error_bars_in_both_directions():
    points = [Point(1.0, 1.0, "base"), Point(2.0, 0.9, "fast", (1.8, 2.3), (0.85, 0.93))]
    plot = charts.draw(points, row(), charts.RATIO, charts.WIDE)
    base, fast = plot.points
    assert base["x_bar"] is None and base["y_bar"] is None
    assert fast["x_bar"][0] < fast["x"] < fast["x_bar"][1] and fast["y_bar"][0] < fast["y"] < fast["y_bar"][1]
    assert all(plot.left <= x <= plot.right for x in fast["x_bar"])
    assert all(0 <= y <= plot.bottom for y in fast["y_bar"])
    assert fast["value"] == "0.9000 (0.8500 to 0.9300) at 2x (1.8 to 2.3)"


def boxes(plot):
    """Boxes of names, by name, and those of points and error bars."""
    shifts = {"start": 0.0, "middle": 0.5, "end": 1.0}
    names, marks = {}, []
    for dot in plot.points:
        if dot["label"]:
            width = labels.LETTER * len(dot["label"])
            start = dot["label_x"] - shifts[dot["anchor"]] * width
            names[dot["name"]] = (start, dot["label_y"] - 9, start + width, dot["label_y"] + 2)
        x_bar, y_bar = dot["x_bar"] or (dot["x"],) * 2, dot["y_bar"] or (dot["y"],) * 2
        marks += [(x_bar[0], dot["y"] - 1, x_bar[1], dot["y"] + 1), (dot["x"] - 1, y_bar[0], dot["x"] + 1, y_bar[1])]
        marks.append((dot["x"] - 5, dot["y"] - 5, dot["x"] + 5, dot["y"] + 5))
    return names, marks


def apart(one, other):
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


@pytest.mark.parametrize("size", [charts.WIDE, charts.NARROW, charts.SMALL])
@pytest.mark.parametrize("count", [4, 12, 40])
def test_names_touch_no_name_point_or_error_bar(size, count):
    points = [
        Point(1 + (i % 5) / 40, 0.5 + (i % 3) / 500, f"a-long-name-of-run-{i}", (0.98, 1.15), (0.49, 0.52))
        for i in range(count)
    ]
    plot = charts.draw([*points, Point(2.0, 0.9, "far")], row(), charts.RATIO, size)
    names, marks = boxes(plot)
    assert "far" in names and set(names) | set(plot.unnamed) == {dot["name"] for dot in plot.points}
    assert all(apart(one, other) for one, other in combinations(names.values(), 2))
    assert all(apart(name, mark) for name in names.values() for mark in marks)
    assert all(plot.left <= name[0] and name[2] <= plot.width and name[3] <= plot.bottom for name in names.values())


def test_a_long_name_is_shortened_in_the_plot_and_whole_in_its_words():
    name = "dpmpp2m-steps=8-size=128x128-guidance=3"
    plot = charts.draw([Point(1.0, 1.0, "base"), Point(2.0, 0.9, name)], row(), charts.RATIO, charts.WIDE)
    dot = plot.points[1]
    assert len(dot["label"]) == labels.LONGEST and dot["label"].endswith("guidance=3") and dot["name"] == name


def test_differences_stand_around_the_baseline_with_the_noise_of_seeds_as_a_band():
    rows = [
        row(metric="s", family="alignment", run="base", value=80.0, delta=None),
        row(metric="s", family="alignment", run="fast", value=79.0, delta=-1.0,
            delta_interval={"low": -1.5, "high": -0.5}, floor=0.1, floor_interval={"low": -0.2, "high": 0.3}),
        {"metric": "speedup", "key": "speed-up", "family": "cost", "run": "fast", "better": "higher", "value": 2.0,
         "interval": {"low": 1.9, "high": 2.1}},
    ]  # fmt: skip
    plot = charts.quality_plot({"metrics": rows, "baseline": "base"}, "SSIM", charts.WIDE)
    values = {dot["name"]: dot["value"] for dot in plot.points}
    assert values["base"] == "0.000 at 1x" and values["fast"].startswith("-1.000 (-1.500 to -0.500) at 2x")
    base = next(dot for dot in plot.points if dot["name"] == "base")
    top, height = plot.band
    assert top < base["y"] < top + height and "difference to the baseline" in plot.y_title
    assert charts.quality_plot({"metrics": rows[:2], "baseline": "base"}, "SSIM", charts.WIDE) is None  # no times


def test_a_dot_between_error_bars_has_its_name_at_the_end_of_its_own():
    bars = {"x_bar": (80.0, 120.0), "y_bar": (80.0, 160.0)}
    walls = [{"x": x, "y": 100.0, "name": "", "x_bar": None, "y_bar": (0.0, 165.0)} for x in (60.0, 140.0)]
    dot = {"x": 100.0, "y": 100.0, "name": "a-name-of-a-run", **bars}
    labels.place_names([*walls, dot], (0.0, 0.0, 300.0, 200.0))
    assert dot["anchor"] == "middle" and dot["label_y"] == 160 + labels.GAP + 9 and dot["leader"] is None
