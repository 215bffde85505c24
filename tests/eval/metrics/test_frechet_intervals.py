"""Bias, extrapolation and intervals of the Fréchet distance, by simulation on Gaussians of known distance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics.frechet import Moments, distance, distance_of_features, gaussian
from diffaccel.eval.metrics.frechet_influence import influence
from diffaccel.eval.metrics.frechet_intervals import (
    difference,
    distance_interval,
    infinity,
    infinity_difference,
    ratio,
)
from diffaccel.eval.uncertainty.intervals import Interval

D, N = 16, 500
VARIANCES = torch.arange(1, D + 1, dtype=torch.float64) ** -0.7
REFERENCE = Moments.from_covariance(torch.zeros(D), torch.diag(VARIANCES))
SCALE, SHIFT = 1.1, 0.05
TRUTH = D * SHIFT**2 + float(VARIANCES.sum()) * (SCALE - 1) ** 2  # of the population


def samples(seed: int, scale: float = SCALE, shift: float = SHIFT, n: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator, dtype=torch.float64) * VARIANCES.sqrt() * scale + shift


def pair(seed: int, scale: float = SCALE, shift: float = SHIFT) -> tuple[Tensor, Tensor]:
    """Two runs of the same ids: what they draw correlates by 0.95."""
    a, other = samples(seed, 1, 0), samples(10_000 + seed, 1, 0)
    return a, (0.95 * a + (1 - 0.95**2) ** 0.5 * other) * scale + shift


def covered(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


@pytest.mark.slow
def test_bias_of_equal_gaussians() -> None:
    """``(d/n)(1 + (d+1)/4)``; the term after it is of order ``d^3/n^2``."""
    reference = Moments.from_covariance(torch.zeros(D), torch.eye(D))
    means = [samples(seed, n=2000) for seed in range(20)]
    values = [distance_interval(x / VARIANCES.sqrt() / SCALE - SHIFT / VARIANCES.sqrt() / SCALE, reference).value
              for x in means]  # fmt: skip
    assert sum(values) / 20 == pytest.approx(D / 2000 * (1 + (D + 1) / 4), rel=0.05)


@pytest.mark.slow
def test_infinity_covers_the_population_and_the_plain_distance_does_not() -> None:
    estimates = [(infinity(x, REFERENCE), distance_interval(x, REFERENCE)) for x in map(samples, range(100))]
    assert sum(covered(found.interval, TRUTH) for found, _ in estimates) >= 90
    assert sum(covered(naive, TRUTH) for _, naive in estimates) < 50
    mean = sum(found.value for found, _ in estimates) / 100
    assert abs(mean - TRUTH) < 0.15 * (sum(naive.value for _, naive in estimates) / 100 - TRUTH)


@pytest.mark.slow
def test_a_quadratic_where_subsets_have_fewer_rows_than_dimensions() -> None:
    """With 120 images of 16 features the smallest size is 12: the line is far too low, which its interval knows."""
    line = [infinity(samples(seed, n=120), REFERENCE) for seed in range(60)]
    curve = [infinity(samples(seed, n=120), REFERENCE, fit="quadratic") for seed in range(60)]
    error_of_line, error_of_curve = (sum(f.value for f in found) / 60 - TRUTH for found in (line, curve))
    assert error_of_line < -0.05
    assert abs(error_of_curve) < 0.5 * abs(error_of_line)
    assert sum(covered(f.interval, TRUTH) for f in line) >= 54
    assert sum(covered(f.interval, TRUTH) for f in curve) >= 54
    assert "under twice the 16 features" in line[0].warning
    assert curve[0].warning == ""


def test_infinity_of_exact_rows() -> None:
    x = samples(0)
    found = infinity(x, REFERENCE, seed=3)
    assert len(found.sizes) == len(found.values) == 15
    assert (found.sizes[0], found.sizes[-1]) == (N // 10, N)
    steps = torch.linspace(1 / N, 10 / N, 15, dtype=torch.float64)  # even in 1/n
    assert all(abs(size - 1 / step) <= 1 for size, step in zip(found.sizes, steps.flip(0).tolist(), strict=True))
    assert found.values[-1] == pytest.approx(distance_interval(x, REFERENCE).value, rel=1e-12)
    assert found.value + found.slope / N == pytest.approx(found.values[-1], rel=0.1)
    assert found.r2 > 0.99
    assert found == infinity(x, REFERENCE, seed=3) != infinity(x, REFERENCE, seed=4)


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "shift"), [(SCALE, SHIFT), (1.0, 0.0)])
def test_difference_covers_what_it_says(scale: float, shift: float) -> None:
    """The mean difference at this number of images, from independent draws, lies in nine of ten intervals at least."""
    runs = [pair(seed, scale, shift) for seed in range(200)]
    found = [difference(a, b, REFERENCE) for a, b in runs[:100]]
    values = [by_singular_values(a) - by_singular_values(b) for a, b in runs[100:]]
    truth = sum(values) / 100
    assert sum(covered(interval, truth) for interval in found) >= 90
    if scale == 1:
        assert sum(interval.significant for interval in found) <= 10
    else:
        assert all(interval.significant and interval.value < 0 for interval in found)
        # not wide enough to cover anything
        assert width(found) < 8 * float(torch.tensor(values).std())


def by_singular_values(x: Tensor) -> float:
    """The distance to ``REFERENCE`` with its diagonal covariance, through eigenvalues."""
    centred = (x - x.mean(0)) * VARIANCES.sqrt()
    root = torch.linalg.svdvals(centred).sum() / (len(x) - 1) ** 0.5
    return float(x.mean(0).square().sum() + x.var(0).sum() + VARIANCES.sum() - 2 * root)


def test_pairing_narrows_the_interval() -> None:
    runs = [pair(seed, 1, 0) for seed in range(20)]
    paired = [difference(a, b, REFERENCE) for a, b in runs]
    unpaired = [difference(a, b.flip(0), REFERENCE) for a, b in runs]
    assert width(paired) < 0.6 * width(unpaired)
    for (a, b), one, other in zip(runs, paired, unpaired, strict=True):
        expected = by_singular_values(a) - by_singular_values(b)
        assert one.value == pytest.approx(expected, rel=1e-8)
        assert other.value == pytest.approx(expected, rel=1e-8)


def width(found: list[Interval]) -> float:
    return sum(interval.high - interval.low for interval in found) / len(found)


@pytest.mark.slow
def test_ratio_covers_what_it_says() -> None:
    """The mean logarithm of the ratio, from independent draws, lies in nine of ten intervals, which tell it from 1."""
    runs = [pair(seed) for seed in range(60)]
    found = [ratio(a, b, REFERENCE) for a, b in runs[:30]]
    values = [math.log(by_singular_values(a) / by_singular_values(b)) for a, b in runs[30:]]
    assert sum(covered(interval, math.exp(sum(values) / 30)) for interval in found) >= 27
    assert all(interval.significant and interval.high < 1 for interval in found)


def test_ratio_of_two_runs_is_that_of_their_distances() -> None:
    a, b = pair(0)
    found, other, same = ratio(a, b, REFERENCE), ratio(b, a, REFERENCE), ratio(a, a, REFERENCE)
    assert found.value == pytest.approx(by_singular_values(a) / by_singular_values(b), rel=1e-8)
    assert (1 / other.value, 1 / other.high) == pytest.approx((found.value, found.low), rel=0.02)
    assert (same.value, same.low, same.high, same.significant) == (1, 1, 1, False)
    with pytest.raises(DiffAccelError, match="have no ratio"):
        ratio(a, b, a)


def test_a_run_and_itself_differ_by_nothing() -> None:
    a = samples(0)
    same = difference(a, a, REFERENCE)
    assert (same.value, same.low, same.high, same.significant) == (0, 0, 0, False)
    assert "of 500 influences, reference fixed" in same.method


def moved(x: Tensor, y: Tensor, row: int, *, pairs: bool) -> float:
    """The derivative as a row gets more weight, by differences: of Moments with that row's weight raised."""

    def weighted(rows: Tensor, step: float) -> Moments:
        weights = torch.ones(len(rows), dtype=torch.float64)
        weights[row] += step
        weights /= weights.sum()
        mean = weights @ rows
        centred = rows - mean
        covariance = (weights[:, None] * centred).T @ centred * len(rows) / (len(rows) - 1)
        return Moments.from_covariance(mean, covariance)

    def value(step: float) -> float:
        return distance(weighted(x, step), weighted(y, step) if pairs else Moments.of(y))

    step = 1e-3
    return (value(step) - value(-step)) / (2 * step) * len(x)


@pytest.mark.parametrize("pairs", [False, True])
def test_influences_are_derivatives(pairs: bool) -> None:
    x, y = samples(3)[:60], samples(4, 1, 0)[:60]
    expected = torch.tensor([moved(x, y, row, pairs=pairs) for row in range(60)], dtype=torch.float64)
    influences = influence(x, gaussian(y)) + (influence(y, gaussian(x)) if pairs else 0)
    assert torch.allclose(influences, expected, rtol=0.03, atol=0.03)  # 1 / (n - 1) of the covariance is neglected
    assert abs(float(influences.sum())) < 1e-9


def test_influences_of_fewer_rows_than_dimensions() -> None:
    """A further dimension in which nothing differs changes nothing, and neither does turning the features."""
    x, y = samples(3)[:12], samples(4)
    turn = torch.linalg.qr(samples(5)[:D]).Q
    turned = influence(x @ turn, gaussian(y @ turn))
    assert torch.allclose(influence(x, gaussian(y)), turned, atol=1e-9)
    padded = influence(torch.nn.functional.pad(x, (0, 9)), gaussian(torch.nn.functional.pad(y, (0, 9))))
    assert torch.allclose(influence(x, gaussian(y)), padded, atol=1e-9)


def test_paired_rows_move_together() -> None:
    x = samples(3)[:150]
    y = x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(6))
    pairs = [(i, int(order.argsort()[i])) for i in range(150)]
    found, fixed = distance_interval(x, y[order], pairs=pairs), distance_interval(x, y)
    assert found.value == pytest.approx(fixed.value, rel=1e-9)
    assert "both sides paired" in found.method and fixed.high - fixed.low > 2 * (found.high - found.low)
    in_order = distance_interval(x, y, pairs=[(i, i) for i in range(150)])
    assert (found.low, found.high) == pytest.approx((in_order.low, in_order.high), rel=1e-9)
    more = distance_interval(x, torch.cat([y[order], samples(9)[:50]]), pairs=pairs)  # some rows without a partner
    assert more.low < more.value < more.high


def test_difference_of_extrapolations() -> None:
    a, b = pair(0)
    found = infinity_difference(a, b, REFERENCE)
    assert found.value == pytest.approx(infinity(a, REFERENCE).value - infinity(b, REFERENCE).value, rel=1e-12)
    assert found.null == 0 and found.low < found.value < found.high
    assert width([found]) < width([infinity_difference(a, b.flip(0), REFERENCE)])
    same = infinity_difference(a, a, REFERENCE)
    assert (same.low, same.value, same.high) == (0, 0, 0)


def test_a_reference_of_features() -> None:
    a, reference = samples(0), samples(1, n=300)
    assert distance_interval(a, reference).value == pytest.approx(distance_of_features(a, reference), rel=1e-12)
    assert infinity(a, reference).values[-1] == pytest.approx(distance_of_features(a, reference), rel=1e-12)


def test_refused() -> None:
    x = samples(0)
    with pytest.raises(DiffAccelError, match="same ids in both runs; got 500 and 499"):
        difference(x, x[1:], REFERENCE)
    with pytest.raises(DiffAccelError, match="at least 30 rows"):
        distance_interval(x[:29], REFERENCE)
    with pytest.raises(DiffAccelError, match="reference has 16 features, the samples have 15"):
        infinity(x[:, 1:], REFERENCE)
    with pytest.raises(DiffAccelError, match="reference has 16 features, the samples have 15"):
        difference(x[:, 1:], x[:, 1:], x)
    with pytest.raises(DiffAccelError, match="Did you mean 'quadratic'"):
        infinity(x, REFERENCE, fit="quadratik")  # type: ignore[arg-type]
    with pytest.raises(DiffAccelError, match="at least 5 sizes"):
        infinity(x, REFERENCE, sizes=4)


def test_rows_that_are_all_alike() -> None:
    """As those of black pictures: a set without spread is a Gaussian without spread, on either side or on both."""
    alike, other = torch.ones(120, 4, dtype=torch.float64), samples(0)[:120, :4]
    ids = [(i, i) for i in range(120)]
    assert distance_interval(alike, alike, pairs=ids).high == distance_interval(alike, Moments.of(alike)).high == 0
    to_a_point = distance_interval(other, Moments.of(alike))
    squares = (other - 1).square().sum(1)  # FD to a point: the squared distance of means, and the trace
    assert to_a_point.value == pytest.approx(float(squares.sum() - (other.mean(0) - 1).square().sum()) / 119, rel=1e-9)
    assert to_a_point.low < to_a_point.value < to_a_point.high
    assert distance_interval(alike, other, pairs=ids).value == pytest.approx(to_a_point.value, rel=1e-9)
    assert difference(other, alike, Moments.of(alike)).value == pytest.approx(to_a_point.value, rel=1e-9)
