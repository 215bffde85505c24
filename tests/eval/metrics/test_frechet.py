"""The Fréchet distance against closed forms, a second derivation, and the traps of its numerics."""

from __future__ import annotations

import warnings
from functools import reduce

import numpy as np
import pytest
import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics.frechet import Gaussian, Moments, between, distance, distance_of_features


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(draw(d, d, seed=99)).Q


def of_diagonal(mean: float, variances: Tensor, turn: Tensor | None = None) -> Moments:
    turn = torch.eye(len(variances), dtype=torch.float64) if turn is None else turn
    means = torch.full_like(variances, mean)
    return Moments.from_covariance(means, turn @ torch.diag(variances) @ turn.T, n=10_000)


@pytest.mark.slow
def test_shifted_unit_gaussians_of_2048_dimensions() -> None:
    one = torch.ones(2048, dtype=torch.float64)
    assert distance(of_diagonal(0, one), of_diagonal(1, one)) == pytest.approx(2048, rel=1e-12)


@pytest.mark.parametrize("rotated", [False, True])
def test_covariances_that_commute(rotated: bool) -> None:
    a, b = (10 ** torch.empty(48, dtype=torch.float64).uniform_(-6, 2, generator=torch.Generator().manual_seed(s))
            for s in (1, 2))  # fmt: skip
    turn = rotation(48) if rotated else None
    expected = float((a.sqrt() - b.sqrt()).square().sum())
    assert distance(of_diagonal(0, a, turn), of_diagonal(0, b, turn)) == pytest.approx(expected, rel=1e-9)


def test_isotropic_gaussians() -> None:
    one = torch.ones(30, dtype=torch.float64)
    x, y = of_diagonal(0, 0.7**2 * one), of_diagonal(0.2, 1.9**2 * one)
    assert distance(x, y) == pytest.approx(30 * 0.2**2 + 30 * (1.9 - 0.7) ** 2, rel=1e-12)


def test_covariances_that_do_not_commute() -> None:
    """``tr (S_x S_y)^(1/2) = tr (S_x^(1/2) S_y S_x^(1/2))^(1/2)``, of well-conditioned matrices."""
    x, y = Moments.of(draw(500, 12)), Moments.of(draw(400, 12, seed=1) @ draw(12, 12, seed=2) + 0.3)
    values, vectors = torch.linalg.eigh(x.covariance)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    trace = torch.linalg.eigvalsh(root @ y.covariance @ root).sqrt().sum()
    expected = (x.mean - y.mean).square().sum() + x.covariance.trace() + y.covariance.trace() - 2 * trace
    assert distance(x, y) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(200, 150), (200, 900), (900, 900)])
def test_ways_agree_at_any_rank(n: int, m: int) -> None:
    """From features and from statistics, also where a covariance is singular; square roots of round-off cost 1e-6."""
    mix = draw(384, 384, seed=3) / 384**0.5
    x, y = draw(n, 384) @ mix, 1.1 * draw(m, 384, seed=1) @ mix + 0.01
    from_features = distance_of_features(x, y)
    mx, my = Moments.of(x), Moments.of(y)
    assert distance(mx, my) == pytest.approx(from_features, rel=1e-9)
    unknown_counts = [Moments.from_covariance(m.mean, m.covariance) for m in (mx, my)]
    assert distance(*unknown_counts) == pytest.approx(from_features, rel=1e-9)
    # the Gram form written out: no covariance at all
    xc, yc = x - x.mean(0), y - y.mean(0)
    trace = torch.linalg.matrix_norm(xc @ yc.T, "nuc") / ((n - 1) * (m - 1)) ** 0.5
    total = xc.square().sum() / (n - 1) + yc.square().sum() / (m - 1)
    expected = float((x.mean(0) - y.mean(0)).square().sum() + total - 2 * trace)
    assert from_features == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [60, 500])
def test_a_set_and_itself(n: int) -> None:
    x = draw(n, 128) * torch.logspace(-4, 1, 128, dtype=torch.float64)
    assert distance_of_features(x, x) == 0.0
    assert distance(Moments.of(x), Moments.of(x)) == 0.0
    # before values within rounding become 0
    assert abs(raw(x, x.flip(0))) < 1e-11 * float(x.var(0).sum())


def raw(x: Tensor, y: Tensor) -> float:
    """The distance of features through their covariances, without rounding small values to 0."""
    cx, cy = (torch.linalg.qr(f - f.mean(0)).R / (len(f) - 1) ** 0.5 for f in (x, y))
    return float(cx.square().sum() + cy.square().sum() - 2 * torch.linalg.svdvals(cx @ cy.T).sum())


def test_dead_features_cost_nothing() -> None:
    x, y = draw(300, 20), draw(300, 20, seed=1) * 1.5
    dead = torch.full((300, 30), 0.37, dtype=torch.float64)
    padded = distance_of_features(torch.cat([x, dead], 1), torch.cat([y, dead], 1))
    assert padded == pytest.approx(distance_of_features(x, y), rel=1e-11)


def test_points_of_no_spread() -> None:
    x, y = torch.zeros(5, 3, dtype=torch.float64), torch.full((4, 3), 2.0, dtype=torch.float64)
    assert distance(Moments.of(x), Moments.of(y)) == 12
    assert distance_of_features(x, x) == 0


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_shards_and_order_do_not_matter(shards: int) -> None:
    x, y = draw(999, 24) + 3, draw(800, 24, seed=1)
    whole = Moments.of(x)
    shuffled = x[torch.randperm(999, generator=torch.Generator().manual_seed(4))]
    merged = reduce(Moments.merge, [Moments.of(part) for part in shuffled.tensor_split(shards)])
    assert merged.n == 999
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-12, atol=1e-13)
    assert distance(merged, Moments.of(y)) == pytest.approx(distance(whole, Moments.of(y)), rel=1e-12)


def test_single_rows_merge_into_the_whole() -> None:
    x = draw(50, 6)
    merged = reduce(Moments.merge, [Moments.of(row[None]) for row in x])
    torch.testing.assert_close(merged.covariance, torch.cov(x.T), rtol=1e-12, atol=1e-14)


def test_far_from_zero_no_digits_are_lost() -> None:
    """Uncentred sums of squares of features near 1e6 are wrong in the fourth digit."""
    # rounded by the shift: both sets are then the same numbers, here and there
    x_far, y_far = draw(400, 16) + 1e6, draw(400, 16, seed=1) * 1.2 + 1e6
    near = distance_of_features(x_far - 1e6, y_far - 1e6)
    parts = [Moments.of(part) for part in x_far.split(64)]
    assert distance(reduce(Moments.merge, parts), Moments.of(y_far)) == pytest.approx(near, rel=1e-9)


def test_half_precision_features_do_not_overflow() -> None:
    x, y = (30 * draw(300, 64) + 100).half(), (30 * draw(300, 64, seed=1) - 400).half()
    value = distance_of_features(x, y)  # 1.6e7: float16 ends at 65504
    assert value == distance_of_features(x.double(), y.double()) > 1e7
    assert Moments.of(x).covariance.dtype == torch.float64


def test_more_rows_than_a_block() -> None:
    x = draw(20_000, 3).float()
    torch.testing.assert_close(Moments.of(x).covariance, torch.cov(x.double().T), rtol=1e-12, atol=1e-13)


def test_impossible_values_are_internal_errors() -> None:
    wrong = Gaussian(torch.zeros(2, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64), torch.eye(2).double())
    with pytest.raises(ArithmeticError, match="negative beyond rounding"):
        between(wrong, wrong)


def test_refused_features() -> None:
    x = draw(10, 4)
    x[[3, 7], 1] = torch.tensor([torch.nan, torch.inf], dtype=torch.float64)
    with pytest.raises(DiffAccelError, match=r"2 of 10 rows .* first is row 3"):
        Moments.of(x)
    with pytest.raises(DiffAccelError, match=r"floating-point tensor \(n, d\), got torch.int64 \(3, 2\)"):
        Moments.of(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(DiffAccelError, match=r"\(3, 2, 1\)"):
        Moments.of(torch.zeros(3, 2, 1))
    with pytest.raises(DiffAccelError, match="0 rows"):
        Moments.of(torch.zeros(0, 4))
    with pytest.raises(DiffAccelError, match="at least 2 rows"):
        distance_of_features(draw(1, 4), draw(9, 4))
    with pytest.raises(DiffAccelError, match="4 features and y has 5"):
        distance_of_features(draw(9, 4), draw(9, 5))


def test_refused_moments() -> None:
    one, other = Moments.of(draw(1, 4)), Moments.of(draw(9, 5))
    with pytest.raises(DiffAccelError, match="n=1"):
        _ = one.covariance
    with pytest.raises(DiffAccelError, match="4 and of 5"):
        one.merge(other)
    with pytest.raises(DiffAccelError, match="4 and of 5"):
        distance(Moments.of(draw(9, 4)), other)
    unknown = Moments.from_covariance(other.mean, other.covariance)
    with pytest.raises(DiffAccelError, match="without a count"):
        unknown.merge(other)
    with pytest.raises(DiffAccelError, match=r"\(5,\) and \(4, 4\)"):
        Moments.from_covariance(torch.zeros(5), torch.eye(4))
    indefinite = Moments.from_covariance(torch.zeros(2), torch.diag(torch.tensor([-1.0, 1.0])))
    with pytest.raises(DiffAccelError, match="no covariance: its smallest eigenvalue is -1"):
        distance(indefinite, indefinite)


def test_parity_with_torch_fidelity() -> None:
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = draw(600, 40) @ draw(40, 40, seed=5), draw(500, 40, seed=1) + 0.2
    theirs = fid.fid_statistics_to_metric(
        fid.fid_features_to_statistics(x), fid.fid_features_to_statistics(y), verbose=False
    )
    assert distance_of_features(x, y) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)


def test_parity_with_pytorch_fid() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    pytest.importorskip("pytorch_fid")
    from pytorch_fid import fid_score

    x, y = draw(600, 40) @ draw(40, 40, seed=5), draw(500, 40, seed=1) + 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            linalg.sqrtm(np.eye(2), disp=False)
        except TypeError:
            pytest.skip("this scipy has no sqrtm(disp=...), which pytorch-fid calls")
        theirs = fid_score.calculate_frechet_distance(
            x.mean(0).numpy(), np.cov(x.numpy().T), y.mean(0).numpy(), np.cov(y.numpy().T)
        )
    assert distance_of_features(x, y) == pytest.approx(theirs, rel=1e-8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n", [100, 900])
def test_a_gpu_gives_the_cpu_s_value(n: int) -> None:
    x, y = draw(n, 300).float(), 1.2 * draw(n, 300, seed=1).float() + 0.1
    expected = distance_of_features(x, y)
    assert distance_of_features(x.cuda(), y.cuda()) == pytest.approx(expected, rel=1e-10)
    assert distance_of_features(x.cuda(), y) == pytest.approx(expected, rel=1e-10)
    assert distance(Moments.of(x), Moments.of(y.cuda())) == pytest.approx(expected, rel=1e-10)
    assert distance_of_features(x.cuda(), x.cuda()) == 0
