"""Ends of numbers whose influences have heavy tails: the upper one of a distance, the heavier one of a difference."""

import math

import numpy as np
import pytest
import torch

from diffaccel.eval.uncertainty.influence import influence_interval
from diffaccel.eval.uncertainty.intervals import bootstrap_mean


def interval(rows: torch.Tensor, tail: float):
    return influence_interval(2.0, lambda kept: rows[kept], len(rows), held="", positive=2.0, tail=tail)


def test_the_upper_end_lies_further_by_the_logarithm_of_the_kurtosis() -> None:
    rows = torch.zeros(200, dtype=torch.float64)
    rows[::50] = torch.tensor([4.0, -3.0, 5.0, 2.0], dtype=torch.float64)
    plain, wide = interval(rows, 0.0), interval(rows, 0.1)
    assert plain.carriers is not None and wide.low == plain.low and wide.value == plain.value
    further = 1 + 0.1 * math.log(200 / plain.carriers / 5)
    assert further > 1.2 and math.log(wide.high / 2) == pytest.approx(further * math.log(plain.high / 2))


def test_of_a_difference_the_end_on_the_side_of_the_heavier_tail_lies_further() -> None:
    rows = torch.zeros(200, dtype=torch.float64)
    rows[::50] = torch.tensor([4.0, -3.0, 5.0, 2.0], dtype=torch.float64)

    def difference(rows: torch.Tensor, tail: float):
        return influence_interval(1.0, lambda kept: rows[kept], len(rows), held="", tail=tail)

    plain, wide, turned = difference(rows, 0.0), difference(rows, 0.2), difference(-rows, 0.2)
    further = 1 + 0.2 * math.log(200 / plain.carriers / 5)
    assert further > 1.4 and wide.low == plain.low
    assert wide.high - 1 == pytest.approx(further * (plain.high - 1))
    assert (1 - turned.low, turned.high - 1) == pytest.approx((wide.high - 1, 1 - wide.low))


def test_light_tails_change_nothing() -> None:
    rows = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert interval(rows, 0.1) == interval(rows, 0.0)


def test_small_noise_of_the_others_does_not_widen_what_few_failures_tell() -> None:
    """Four failures of 1,000: with noise of a hundredth on all values the interval is what it is without."""
    draw = np.random.default_rng(0)
    failed = np.zeros(1000)
    failed[:4] = -1.0
    plain, noisy = bootstrap_mean(failed, seed=1), bootstrap_mean(failed + 0.01 * draw.normal(size=1000), seed=1)
    assert (noisy.low, noisy.high) == pytest.approx((plain.low, plain.high), abs=2e-3) and plain.low > -0.012
