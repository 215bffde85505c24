"""Intervals of influences: those of a mean, the share of what two rows do together, and the scale of a distance."""

from __future__ import annotations

import pytest
import torch

from diffaccel.eval.uncertainty.influence import influence_interval, too_few_rows
from diffaccel.eval.uncertainty.intervals import bootstrap_mean

X = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()


def squared_mean(x):
    """The square of a mean: its influences near a mean of 0 are all of second order."""
    return lambda rows: 2 * x[rows].mean() * (x[rows] - x[rows].mean())


def test_of_a_mean_it_is_the_interval_of_a_mean():
    found = influence_interval(float(X.mean()), lambda rows: X[rows], 200, held="nothing held")
    mean = bootstrap_mean(X)
    assert (found.low, found.high) == pytest.approx((mean.low, mean.high), rel=1e-3)  # halves differ by chance
    assert (found.units, found.null, found.carriers) == (200, 0.0, pytest.approx(mean.carriers))
    assert found.method == "studentised bootstrap of 200 influences, nothing held"


def test_what_two_rows_do_together_counts_once():
    x = X.log()
    x = x - x.mean() + 0.05  # halves differ from 0 by more than all rows
    narrow = influence_interval(0.0, squared_mean(x), 200, held="")
    wide = bootstrap_mean(squared_mean(x)(torch.arange(200)))
    assert 0.7 < (narrow.high - narrow.low) / (wide.high - wide.low) < 0.95


def test_a_distance_is_symmetric_in_its_logarithm_and_stays_positive():
    x = X.log()
    found = influence_interval(0.1, lambda rows: x[rows], 200, held="", positive=0.1)
    less = influence_interval(0.1, lambda rows: x[rows], 200, held="")
    assert 0 < found.low < found.value < found.high and found.null is None
    assert less.low < 0
    shifted = influence_interval(-0.4, lambda rows: x[rows], 200, held="", positive=0.1)
    assert shifted.low == pytest.approx(found.low - 0.5) and shifted.high == pytest.approx(found.high - 0.5)


def test_equal_rows_have_no_width():
    found = influence_interval(3.0, lambda rows: torch.zeros(len(rows)), 50, held="", positive=3.0)
    assert found.low == found.value == found.high == 3


def test_too_few_rows():
    assert too_few_rows(30) == "" and too_few_rows(29, "clips") == "an interval needs 30 clips"
