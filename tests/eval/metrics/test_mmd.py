"""KID and CMMD against closed forms, plain double sums and torch-fidelity."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics import mmd
from diffaccel.eval.metrics.mmd import (
    cmmd,
    cmmd_unbiased,
    gaussian_mmd2,
    kid,
    kid_subsets,
)
from diffaccel.eval.metrics.mmd_intervals import cmmd_difference, cmmd_interval, kid_difference, kid_interval
from diffaccel.eval.uncertainty.intervals import Interval


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(kxx: Tensor, kyy: Tensor, kxy: Tensor, *, unbiased: bool) -> float:
    if not unbiased:
        return float(kxx.mean() + kyy.mean() - 2 * kxy.mean())
    n, m = kxy.shape
    means = [(k.sum() - k.trace()) / (s * (s - 1)) for k, s in ((kxx, n), (kyy, m))]
    return float(means[0] + means[1] - 2 * kxy.mean())


def plain_kid(x: Tensor, y: Tensor) -> float:
    def k(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    return plain(k(x, x), k(y, y), k(x, y), unbiased=True)


def population_kid(d: int, m: float) -> float:
    """Of ``N(0, I)`` and ``N(mu, I)`` with ``m = |mu|^2``, by the moments of the inner products up to the third."""
    return 3 * m / d + 3 * m**2 / d**2 + (m**3 + 6 * m**2 + 3 * m * (d + 2)) / d**3


def expected_mmd2(d: int, s: float, t: float, sigma: float, q: float) -> float:
    """Of ``N(0, s^2 I)`` and ``N(mu, t^2 I)`` with ``q = |mu|^2``, for the Gaussian kernel."""

    def mean(a: float, b: float, q: float) -> float:
        return (1 + (a * a + b * b) / sigma**2) ** (-d / 2) * math.exp(-q / (2 * (sigma**2 + a * a + b * b)))

    return mean(s, s, 0) + mean(t, t, 0) - 2 * mean(s, t, q)


def test_kid_is_the_plain_u_statistic_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(83, 7), draw(61, 7, seed=1) + 0.5
    expected = plain_kid(x, y)
    for block in (5, 16, 83, 4096):
        monkeypatch.setattr(mmd, "BLOCK", block)
        assert kid(x, y) == pytest.approx(expected, rel=1e-12)
    assert kid(y, x.flip(0)) == pytest.approx(expected, rel=1e-12)


def test_kid_of_the_population() -> None:
    """Unbiased: the mean over draws approaches the closed form, within its own standard error."""
    d, m = 32, 4.0
    assert population_kid(d, m) == pytest.approx(0.4392, abs=5e-5)
    values = torch.tensor([kid(draw(400, d, s), draw(300, d, 1000 + s) + (m / d) ** 0.5) for s in range(60)])
    error = float(values.std()) / 60**0.5
    assert error < 0.01
    assert float(values.mean()) == pytest.approx(population_kid(d, m), abs=3 * error)


def test_kid_of_equal_distributions_is_zero_on_average_and_can_be_negative() -> None:
    values = torch.tensor([kid(draw(100, 8, s), draw(100, 8, 500 + s)) for s in range(60)])
    assert abs(float(values.mean())) < 3 * float(values.std()) / 60**0.5
    assert (values < 0).any()


def test_kid_subsets_are_those_of_torch_fidelity() -> None:
    theirs = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = draw(300, 24).float(), (draw(280, 24, seed=1) + 0.2).float()
    options = dict(kid_subsets=20, kid_subset_size=100, rng_seed=2020, verbose=False, kid_kernel="poly",
                   kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1)  # fmt: skip
    expected = theirs.kid_features_to_metric(x.double(), y.double(), **options)
    mean, std = kid_subsets(x, y, subsets=20, size=100)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-10)
    assert std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-10)


def test_subsets_shrink_to_the_smaller_set() -> None:
    x, y = draw(60, 8), draw(60, 8, seed=1)
    mean, std = kid_subsets(x, y, subsets=2, shrink=True)  # both subsets are the sets themselves
    assert mean == pytest.approx(kid(x, y), rel=1e-12) and std == pytest.approx(0, abs=1e-12)
    with pytest.raises(DiffAccelError, match="2 subsets of 1000 rows"):
        kid_subsets(x, y, subsets=2)


def widths_by_leaving_out(value: float, without: Tensor, found: Interval) -> float:
    """The interval's width over that of Student's with the jackknife's error, of replicates without each row."""
    n = len(without)
    error = float(((n - 1) / n * (without - without.mean()).square().sum()).sqrt())
    assert found.value == pytest.approx(value, rel=1e-9)
    return (found.high - found.low) / (2 * 1.96 * error)


def test_intervals_are_as_wide_as_the_jackknife_says() -> None:
    a, b, reference = draw(120, 5), draw(120, 5, seed=2) * 1.3, draw(30, 5, seed=1) + 0.5
    rows = torch.arange(120)
    without_a = torch.tensor([plain_kid(a[rows != i], reference) for i in range(120)])
    without_b = torch.tensor([plain_kid(b[rows != i], reference) for i in range(120)])
    value_a, value_b = plain_kid(a, reference), plain_kid(b, reference)
    assert 0.9 < widths_by_leaving_out(value_a, without_a, kid_interval(a, reference)) < 1.4
    difference = kid_difference(a, b, reference)
    assert 0.9 < widths_by_leaving_out(value_a - value_b, without_a - without_b, difference) < 1.4
    cmmd_without = torch.tensor([cmmd(a[rows != i], reference, sigma=1) for i in range(120)])
    found = cmmd_interval(a, reference, sigma=1)
    assert 0.9 < widths_by_leaving_out(cmmd(a, reference, sigma=1), cmmd_without, found) < 1.4
    assert cmmd_difference(a, a, reference).low == cmmd_difference(a, a, reference).high == 0


def plain_paired_kid(x: Tensor, y: Tensor) -> float:
    """The U-statistic of Gretton et al. 2012, equation 4, of rows in pairs: all sums go over i != j."""
    n, (kxx, kyy, kxy) = len(x), ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    h = kxx + kyy - kxy - kxy.T
    return float((h.sum() - h.trace()) / (n * (n - 1)))


def test_pairs_are_left_out_of_the_cross_term_and_move_together() -> None:
    x = draw(60, 5)
    y = x + 0.1 * draw(60, 5, seed=3) + 0.2
    order = torch.randperm(60, generator=torch.Generator().manual_seed(4))  # row i of x belongs to row place[i] of it
    place = order.argsort()
    pairs, rows = [(i, int(place[i])) for i in range(60)], torch.arange(60)
    found = kid_interval(x, y[order], pairs=pairs)
    assert kid(x, y[order], pairs=pairs) == pytest.approx(plain_paired_kid(x, y), rel=1e-9)
    without = torch.tensor([plain_paired_kid(x[rows != i], y[rows != i]) for i in range(60)])
    assert 0.8 < widths_by_leaving_out(plain_paired_kid(x, y), without, found) < 1.5
    assert "both sides paired" in found.method
    assert kid(x[:20], x[:20] + 0.01) < 0 < kid_interval(x, x + 0.01, pairs=[(i, i) for i in range(60)]).high


def test_some_rows_may_be_without_a_partner() -> None:
    x, y = draw(12, 4), draw(15, 4, seed=1)
    y[3:9] = x[:6] + 0.01
    pairs = [(i, i + 3) for i in range(6)]
    total = [(x[i] @ y[j] / 4 + 1) ** 3 for i in range(12) for j in range(15) if (i, j) not in pairs]
    own = plain_kid(x, y) + 2 * ((x @ y.T / 4 + 1) ** 3).mean()
    found = kid_interval(x, y, pairs=pairs)
    assert found.value == pytest.approx(float(own - 2 * torch.stack(total).mean()), rel=1e-9)
    assert found.low < found.value < found.high


def test_equal_distributions_in_pairs_have_no_negative_distance_on_average() -> None:
    values, plain_values = [], []
    for seed in range(60):
        x = draw(60, 8, seed=seed)
        y = 0.95 * x + (1 - 0.95**2) ** 0.5 * draw(60, 8, seed=1000 + seed)
        values.append(kid(x, y, pairs=[(i, i) for i in range(60)]))
        plain_values.append(kid(x, y))
    spread = torch.tensor(values).std() / 60**0.5
    assert abs(sum(values) / 60) < 3 * spread and max(plain_values) < 0


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.3, 0.0])
def test_intervals_cover(shift: float) -> None:
    reference = draw(300, 12, seed=7)
    runs = [(draw(150, 12, 100 + s) + shift, draw(150, 12, 5000 + s)) for s in range(160)]
    runs = [(a, 0.9 * (a - shift) + (1 - 0.9**2) ** 0.5 * b) for a, b in runs]
    truth = sum(kid(a, reference) - kid(b, reference) for a, b in runs[100:]) / 60
    truth_a = sum(kid(a, reference) for a, _ in runs[100:]) / 60
    differences = [kid_difference(a, b, reference) for a, b in runs[:100]]
    singles = [kid_interval(a, reference) for a, _ in runs[:100]]
    assert sum(i.low <= truth <= i.high for i in differences) >= 90
    assert sum(i.low <= truth_a <= i.high for i in singles) >= 90
    assert sum(i.significant for i in differences) >= 95 if shift else sum(i.significant for i in differences) <= 10


@pytest.mark.parametrize("unbiased", [False, True])
def test_gaussian_kernel_is_the_plain_sum(unbiased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(40, 6) + 1e6, draw(55, 6, seed=1) * 1.5 + 1e6
    kernels = [torch.exp(-torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2 / 18)
               for a, b in ((x, x), (y, y), (x, y))]  # fmt: skip
    monkeypatch.setattr(mmd, "BLOCK", 16)
    expected = plain(*kernels, unbiased=unbiased)
    assert gaussian_mmd2(x, y, sigma=3, unbiased=unbiased) == pytest.approx(expected, rel=1e-9)


def test_one_row_that_differs_is_no_certain_distance() -> None:
    """The products that one row is in cancel: a distance of exactly 0, which its own interval cannot know."""
    x = draw(40, 4)
    y, pairs = x.clone(), [(i, i) for i in range(40)]
    equal = kid_interval(x, y, pairs=pairs)
    assert equal.high == pytest.approx(0, abs=1e-12)
    y[7] = 5.0
    changed = kid_interval(x, y, pairs=pairs)
    assert changed.high == pytest.approx(0, abs=1e-12) and changed.carriers == 1
    y[9] = 5.0
    assert kid_interval(x, y, pairs=pairs).high > 1e-3 and kid_interval(x, y, pairs=pairs).carriers <= 2


def test_gaussian_kernel_of_the_population() -> None:
    d, s, t, sigma, q = 8, 1.0, 1.5, 3.0, 1.28
    truth = expected_mmd2(d, s, t, sigma, q)
    assert truth == pytest.approx(0.092604, abs=5e-7)
    values = torch.tensor([gaussian_mmd2(draw(300, d, i) * s, draw(300, d, 900 + i) * t + 0.4, sigma=sigma,
                                         unbiased=True) for i in range(60)])  # fmt: skip
    error = float(values.std()) / 60**0.5
    assert error < 0.002
    assert float(values.mean()) == pytest.approx(truth, abs=3 * error)
    # the V-statistic keeps k(x, x) = 1, which adds (1 - E k) / n for each set
    biased = gaussian_mmd2(draw(300, d), draw(300, d, 900) * t + 0.4, sigma=sigma)
    assert biased > gaussian_mmd2(draw(300, d), draw(300, d, 900) * t + 0.4, sigma=sigma, unbiased=True)


def test_cmmd_normalises_and_scales() -> None:
    x, y = draw(50, 16), draw(60, 16, seed=1) + 0.5
    unit = [f / f.norm(dim=1, keepdim=True) for f in (x, y)]
    expected = plain(*(torch.exp((a @ b.T - 1) / 100) for a, b in ((unit[0],) * 2, (unit[1],) * 2, unit)),
                     unbiased=False)  # fmt: skip
    assert cmmd(x, y) == pytest.approx(1000 * expected, rel=1e-9)
    assert cmmd(7 * x, 0.1 * y) == pytest.approx(cmmd(x, y), rel=1e-12)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-12)
    assert cmmd_unbiased(x, y) < cmmd(x, y)


def test_one_or_two_points() -> None:
    x = torch.tensor([[1.0, 0.0]])
    y = torch.tensor([[0.0, 1.0]])
    assert cmmd(x, y) == pytest.approx(1000 * 2 * -math.expm1(-0.01), rel=1e-12)
    assert kid(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [3.0]])) == pytest.approx(
        3**3 + 1 - 2 * (1 + 1 + 4**3 + 7**3) / 4
    )


def test_refused() -> None:
    x, y = draw(10, 4), draw(12, 4, seed=1)
    with pytest.raises(DiffAccelError, match="at most those of the smaller set"):
        kid_subsets(x, y)
    with pytest.raises(DiffAccelError, match="at least 2 rows"):
        kid(x[:1], y)
    with pytest.raises(DiffAccelError, match="x has 3 features and y has 4"):
        kid(x[:, 1:], y)
    with pytest.raises(DiffAccelError, match="got 10 and 9 rows"):
        kid_difference(x, x[1:], y)
    with pytest.raises(DiffAccelError, match="y: 1 embeddings are all zero"):
        cmmd(x, torch.cat([y, torch.zeros(1, 4)]))
    with pytest.raises(DiffAccelError, match="sigma must be positive, got 0"):
        cmmd(x, y, sigma=0)
    with pytest.raises(DiffAccelError, match="1 of 10 rows hold NaN"):
        kid(torch.where(x == x[4, 0], torch.nan, x), y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_cpu_s_value() -> None:
    x, y = draw(300, 16).float(), draw(280, 16, seed=1).float() + 0.1
    assert kid(x.cuda(), y.cuda()) == pytest.approx(kid(x, y), rel=1e-10)
    assert cmmd(x.cuda(), y.cuda()) == pytest.approx(cmmd(x, y), rel=1e-10)
    assert kid_subsets(x.cuda(), y, subsets=3, size=50) == pytest.approx(kid_subsets(x, y, subsets=3, size=50))
    assert kid_difference(x[:280].cuda(), y, x).low == pytest.approx(kid_difference(x[:280], y, x).low, rel=1e-9)
