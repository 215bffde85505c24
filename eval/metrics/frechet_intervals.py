"""What a Fréchet distance owes to its sample: bias at finite n, extrapolation to infinity, intervals.

The reference is held fixed throughout: intervals tell how far other samples of the same model would move the number.
Naive bootstraps are wrong here, since repeated rows act like fewer images and the distance grows with 1/n. Everything
below draws without replacement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval.metrics.feature_matrix import checked, paired
from diffaccel.eval.metrics.frechet import Gaussian, Moments, between, gaussian
from diffaccel.eval.uncertainty.intervals import Interval

SHARDS = 10
_STUDENT = 2.2621571628  # the 0.975 quantile of Student's t with SHARDS - 1 degrees of freedom
Fit = Literal["linear", "quadratic"]


def expected_bias(d: int, n: int, m: int | None = None) -> float:
    """What the distance of two equal Gaussians ``N(0, I_d)`` is on average, to first order: ``(d/n) (1 + (d+1)/4)``.

    The first part is the squared error of the mean, the second that of the covariance's square root. ``n`` counts the
    samples; a reference estimated from ``m`` images adds as much for ``m``. Only a guide for other covariances, and
    too large where ``n`` is not well above ``d``.
    """
    if d < 1 or n < 1 or (m is not None and m < 1):
        raise DiffAccelError(f"Dimensions and counts must be positive, got d={d}, n={n}, m={m}.")
    return d * (1 + (d + 1) / 4) * (1 / n + (1 / m if m else 0))


@dataclass(frozen=True)
class Infinity:
    """A Fréchet distance extrapolated to infinitely many samples.

    Attributes:
        interval: the intercept and its 95 % interval.
        slope: of the straight line, per ``1/n``; the bias at ``n`` images is about ``slope / n``.
        r2: share of the variance that the fitted curve explains.
        fit: "linear" or "quadratic" in ``1/n``.
        sizes: numbers of images.
        values: mean distance at each size.
        warning: what makes the number doubtful, or "".
    """

    interval: Interval
    slope: float
    r2: float
    fit: Fit
    sizes: tuple[int, ...]
    values: tuple[float, ...]
    warning: str

    @property
    def value(self) -> float:
        """The intercept."""
        return self.interval.value


def infinity(
    features: Tensor, reference: Tensor | Moments, *, sizes: int = 15, fit: Fit = "linear", seed: int = 0
) -> Infinity:
    """FD-infinity (Chong & Forsyth, arXiv 1911.07023): the intercept of the distance as a function of ``1/n``.

    Sizes lie evenly in ``1/n`` from ``n/10`` to ``n``. Where the paper takes one random subset of each size, here as
    many disjoint ones as there are go into the mean, which about halves the variance and takes some 75 distances for
    15 sizes. The straight line is the paper's; it is biased, mostly downwards, where the smallest size is not well
    above ``d``, and the quadratic takes most of that away.

    The interval is Student's, from the spread of the ten disjoint subsets of size ``n/10`` (the luck of these very
    images) and the residuals of the fit; for the line it is widened by the distance to the quadratic's intercept (the
    error of its form).

    Args:
        features: ``(n, d)``, at least 100 rows.
        reference: features ``(m, d)`` or moments.
        sizes: at least 5.
        fit: "linear" or "quadratic".
        seed: of the subsets.
    """
    n, d = checked(features, least=100).shape
    if fit not in ("linear", "quadratic"):
        raise unknown("fit", fit, ("linear", "quadratic"))
    if sizes < 5:
        raise DiffAccelError(f"A fit needs at least 5 sizes, got {sizes}.")
    target = _target(reference, d)
    generator = torch.Generator().manual_seed(seed)
    counts = [int(n / s) for s in torch.linspace(SHARDS, 1, sizes, dtype=torch.float64).tolist()]
    values, shards = [], torch.empty(0)
    for count in counts:
        order = torch.randperm(n, generator=generator).to(features.device)
        parts = order[: n // count * count].view(-1, count)
        found = torch.tensor([between(gaussian(features[part]), target) for part in parts], dtype=torch.float64)
        values.append(float(found.mean()))
        shards = found if count == counts[0] else shards
    u = n / torch.tensor(counts, dtype=torch.float64)
    line, line_variance, line_r2 = _fit(u, values, 1)
    curve, curve_variance, curve_r2 = _fit(u, values, 2)
    linear = fit == "linear"
    value, variance = (line[0], line_variance) if linear else (curve[0], curve_variance)
    half = _STUDENT * float(shards.var() / len(shards) + variance) ** 0.5
    half += abs(float(line[0] - curve[0])) if linear else 0.0
    method = f"{fit} in 1/n over {sizes} sizes, spread of {len(shards)} disjoint subsets"
    warning = ""
    if linear and counts[0] < 2 * d:
        warning = f"The smallest size, {counts[0]}, is under twice the {d} features: a straight line comes out too low."
    return Infinity(
        Interval(float(value), float(value) - half, float(value) + half, 0.95, method),
        slope=float(line[1]) * n,
        r2=line_r2 if linear else curve_r2,
        fit=fit,
        sizes=tuple(counts),
        values=tuple(values),
        warning=warning,
    )


def _fit(u: Tensor, values: list[float], degree: int) -> tuple[Tensor, Tensor, float]:
    """Coefficients by least squares, variance of the intercept, R^2."""
    y = torch.tensor(values, dtype=torch.float64)
    basis = torch.stack([u**p for p in range(degree + 1)], 1)
    inverse = torch.linalg.inv(basis.T @ basis)
    coefficients = inverse @ (basis.T @ y)
    residual = (y - basis @ coefficients).square().sum()
    spread = (y - y.mean()).square().sum()
    variance = residual / (len(y) - degree - 1) * inverse[0, 0]
    return coefficients, variance, 1.0 if spread == 0 else float(1 - residual / spread)


def distance_interval(a: Tensor, reference: Tensor | Moments, *, seed: int = 0) -> Interval:
    """``FD(a, reference)`` with a 95 % interval by the jackknife over ten disjoint shards.

    It covers the mean of the distance at this number of images, whose bias it does not take away: see
    :func:`infinity`.
    """
    a = checked(a, "a", least=10 * SHARDS)
    target = _target(reference, a.shape[1])
    return _jackknife(len(a), lambda rows: between(gaussian(a[rows]), target), seed, None)


def difference(a: Tensor, b: Tensor, reference: Tensor | Moments, *, seed: int = 0) -> Interval:
    """``FD(a, reference) - FD(b, reference)`` of the same ids, row ``i`` with row ``i``, with a 95 % interval.

    Each of ten disjoint shards of ids is left out of both runs in turn; ``theta_k`` being the ten differences,
    ``se^2 = 9/10 sum_k (theta_k - mean)^2`` and the half width is Student's quantile times ``se``. What both runs share
    cancels, so the interval is far narrower than those of the two distances. Simulated on Gaussians it covers 95 to
    99 %, as subsampling half of the ids does with four to ten times the work. It covers the mean at this number of
    images: the biases of the two distances cancel only as far as the runs' covariances are equal.

    Args:
        a, b: ``(n, d)``, at least 100 rows each.
        reference: features ``(m, d)`` or moments.
        seed: of the shards.
    """
    a, b = checked(a, "a", least=10 * SHARDS), checked(b, "b", least=10 * SHARDS)
    paired(a, b)
    target, b = _target(reference, a.shape[1]), b.to(a.device)

    def statistic(rows: Tensor) -> float:
        return between(gaussian(a[rows]), target) - between(gaussian(b[rows]), target)

    return _jackknife(len(a), statistic, seed, 0.0)


def _target(reference: Tensor | Moments, d: int) -> Gaussian:
    found = reference.dim if isinstance(reference, Moments) else checked(reference, "reference", least=2).shape[1]
    if found != d:
        raise DiffAccelError(
            f"The reference has {found} features, the samples have {d}. Both must come from the same extractor."
        )
    return gaussian(reference)


def _jackknife(n: int, statistic: Callable[[Tensor], float], seed: int, null: float | None) -> Interval:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    shard = torch.empty(n, dtype=torch.long)
    shard[order] = torch.arange(n) % SHARDS
    everything = torch.arange(n)
    without = torch.tensor([statistic(everything[shard != k]) for k in range(SHARDS)], dtype=torch.float64)
    error = float(((SHARDS - 1) / SHARDS * (without - without.mean()).square().sum()).sqrt())
    value = statistic(everything)
    half = _STUDENT * error
    method = f"jackknife over {SHARDS} disjoint shards of {n} ids, reference fixed"
    return Interval(value, value - half, value + half, 0.95, method, null)
