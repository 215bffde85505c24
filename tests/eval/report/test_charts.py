"""The frontier of the quality plot, and its ticks."""

from __future__ import annotations

from itertools import pairwise

import pytest

from diffaccel.eval.report import charts


@pytest.mark.parametrize(
    ("better", "names"),
    [("higher", ["fast", "good"]), ("lower", ["fast"])],
)
def test_frontier(better, names):
    points = [
        (1.0, 0.5, "fast"),
        (2.0, 0.9, "good"),
        (3.0, 0.8, "slow"),
        (1.0, 0.4 if better == "higher" else 0.6, "worse"),
    ]
    assert [name for _, _, name in charts.pareto_front(points, better)] == names


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2, 4.7), (0.997, 0.9991), (0, 12345.0)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = charts._ticks(low, high)
    assert 2 <= len(ticks) <= 6 and low <= ticks[0] and ticks[-1] <= high
    steps = {round(b - a, 9) for a, b in pairwise(ticks)}
    assert len(steps) == 1
