"""Intervals of precision, recall, density and coverage: their values, parts of the samples, and what has none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffaccel.eval.metrics import manifold_intervals
from diffaccel.eval.metrics.manifold import density_coverage, precision_recall
from diffaccel.eval.metrics.manifold_intervals import (
    coverage_variance,
    density_coverage_differences,
    density_coverage_intervals,
    precision_recall_differences,
    precision_recall_intervals,
    split_variance,
)


def draw(n: int, d: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REFERENCE, A = draw(150), draw(120, seed=1) * 0.9
B = 0.9 * A + 0.4 * draw(120, seed=2)


def test_values_are_those_of_the_numbers_and_lie_inside() -> None:
    found = (*precision_recall_intervals(REFERENCE, A), *density_coverage_intervals(REFERENCE, A))
    values = (*precision_recall(REFERENCE, A), *density_coverage(REFERENCE, A))
    assert [number.value for number in found] == pytest.approx(values, rel=1e-12)
    for number in (found[0], found[1].interval, found[2], found[3].interval):
        assert number is not None and number.low < number.value < number.high and number.null is None
    less = (*precision_recall_differences(REFERENCE, A, B), *density_coverage_differences(REFERENCE, A, B))
    base = (*precision_recall(REFERENCE, B), *density_coverage(REFERENCE, B))
    assert [number.value for number in less] == pytest.approx([a - b for a, b in zip(values, base, strict=True)])
    assert less[1].interval is not None and less[1].interval.null == less[0].null == 0


def test_recall_of_parts_and_without_a_row() -> None:
    recall = manifold_intervals._Recall(REFERENCE, A, 3, "<=")
    parts = torch.zeros(120, 3, dtype=torch.long)
    parts[:, 0], parts[:40, 1], parts[7:, 2] = 1, 1, 1
    expected = [precision_recall(REFERENCE, A[parts[:, i].bool()])[1] for i in range(3)]
    assert recall.shares(parts).tolist() == pytest.approx(expected)
    rows = torch.arange(120)
    without = torch.tensor([precision_recall(REFERENCE, A[rows != i])[1] for i in range(120)], dtype=torch.float64)
    assert torch.allclose(recall.influences(), 119 * (precision_recall(REFERENCE, A)[1] - without), atol=1e-9)


def test_variance_of_parts() -> None:
    """A mean of n values varies by 1/n, so that the halves' variance is that of n/2."""
    values = draw(400, 1)[:, 0]
    halves = split_variance(lambda parts: values @ parts.double() / parts.sum(0), 400, 2)
    assert halves == pytest.approx(float(values.var()) / 200, rel=0.3)


def test_variances_of_parts_are_extrapolated_by_a_parabola(monkeypatch: pytest.MonkeyPatch) -> None:
    def variance(shares: object, n: int, parts: int) -> float:
        logarithm = math.log(n / parts)
        return math.exp(1 - 0.3 * logarithm - 0.1 * logarithm**2)

    monkeypatch.setattr(manifold_intervals, "split_variance", variance)
    assert coverage_variance(lambda parts: parts, 400) == pytest.approx(variance(None, 400, 1))


def test_what_has_no_interval_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision_recall_intervals(REFERENCE, A[:99])[1].why == "an interval needs 100 pictures"
    assert density_coverage_intervals(REFERENCE, A[:99])[1].interval is None
    everything = precision_recall_intervals(A, A)[1]
    assert everything.value == 1 and everything.interval is None and "no spread" in everything.why
    monkeypatch.setattr(manifold_intervals, "MOST", 1000)
    assert "120 x 150 distances" in precision_recall_intervals(REFERENCE, A)[1].why
