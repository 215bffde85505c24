"""Sampling error of a Fréchet distance: bias at finite n, extrapolation to infinite n, confidence intervals.

The reference is held fixed: intervals tell how far other samples of the same model would move the number. Where the
reference is paired with the samples, row by row, as a baseline's pictures of the same prompts and seeds are, other
samples come with another reference, and shards are left out of both.
The ordinary bootstrap is wrong here, since repeated rows act like fewer images and the distance grows with 1/n.
Everything below draws without replacement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class Infinity:
    """A Fréchet distance extrapolated to infinitely many samples.

    Attributes:
        interval: the intercept and its 95 % interval.
        slope: slope of the straight line, per ``1/n``; the bias at ``n`` images is about ``slope / n``.
        r2: share of the variance explained by the fitted curve.
        fit: "linear" or "quadratic" in ``1/n``.
        sizes: numbers of images.
        values: mean distance at each size.
        warning: why the number is doubtful, or "".
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
        """Intercept of the fit."""
        return self.interval.value


def infinity(
    features: Tensor, reference: Tensor | Moments, *, sizes: int = 15, fit: Fit = "linear", seed: int = 0
) -> Infinity:
    """Compute FD-infinity (arXiv 1911.07023): the intercept of the distance as a function of ``1/n``.

    Sizes lie evenly in ``1/n`` from ``n/10`` to ``n``. The paper (Chong & Forsyth) takes one random subset of each
    size; here the mean is over as many disjoint subsets as there are, which about halves the variance and takes some
    75 distances for 15 sizes. The straight line is the paper's; it is biased, mostly downwards, where the smallest
    size is not well above ``d``, and the quadratic removes most of that bias.

    The interval is Student's, from the spread of the ten disjoint subsets of size ``n/10`` (sampling error) and the
    residuals of the fit; for the line it is widened by the distance to the quadratic's intercept (model error).

    Args:
        features: ``(n, d)``, at least 100 rows.
        reference: features ``(m, d)`` or moments.
        sizes: number of sizes, at least 5.
        fit: "linear" or "quadratic".
        seed: seed of the subsets.
    """
    n, d = checked(features, least=100).shape
    if fit not in ("linear", "quadratic"):
        raise unknown("fit", fit, ("linear", "quadratic"))
    if sizes < 5:
        raise DiffAccelError(f"A fit needs at least 5 sizes, got {sizes}.")
    target = _target(reference, d)
    generator = torch.Generator().manual_seed(seed)
    counts = [int(n / s) for s in torch.linspace(SHARDS, 1, sizes, dtype=torch.float64).tolist()]
    values, shards = _subset_means(features, target, counts, generator)
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


def _subset_means(
    features: Tensor, target: Gaussian, counts: list[int], generator: torch.Generator
) -> tuple[list[float], Tensor]:
    """Return the mean distance over disjoint random subsets of each size, and the distances at the first size."""
    n = len(features)
    values, shards = [], torch.empty(0)
    for count in counts:
        order = torch.randperm(n, generator=generator).to(features.device)
        subsets = order[: n // count * count].view(-1, count)
        distances = torch.tensor([between(gaussian(features[rows]), target) for rows in subsets], dtype=torch.float64)
        values.append(float(distances.mean()))
        shards = distances if count == counts[0] else shards
    return values, shards


def _fit(u: Tensor, values: list[float], degree: int) -> tuple[Tensor, Tensor, float]:
    """Fit a polynomial by least squares: coefficients, variance of the intercept, R^2."""
    y = torch.tensor(values, dtype=torch.float64)
    basis = torch.stack([u**p for p in range(degree + 1)], 1)
    inverse = torch.linalg.inv(basis.T @ basis)
    coefficients = inverse @ (basis.T @ y)
    residual = (y - basis @ coefficients).square().sum()
    spread = (y - y.mean()).square().sum()
    variance = residual / (len(y) - degree - 1) * inverse[0, 0]
    return coefficients, variance, 1.0 if spread == 0 else float(1 - residual / spread)


def distance_interval(
    a: Tensor, reference: Tensor | Moments, *, seed: int = 0, pairs: Sequence[tuple[int, int]] = ()
) -> Interval:
    """Compute ``FD(a, reference)`` with a 95 % interval by the jackknife over ten disjoint shards.

    The interval covers the mean of the distance at this number of images. It does not remove the bias of that mean:
    see :func:`infinity`.

    Args:
        a: ``(n, d)``, at least 100 rows.
        reference: features ``(m, d)`` or moments.
        seed: seed of the shards.
        pairs: rows of ``a`` and of the reference's features that are of one id, and are left out together.
    """
    a = checked(a, "a", least=10 * SHARDS)
    target_without = _target_by_shard(reference, a.shape[1], len(a), seed, pairs)
    return _jackknife(len(a), lambda rows, k: between(gaussian(a[rows]), target_without(k)), seed, None, bool(pairs))


def difference(
    a: Tensor, b: Tensor, reference: Tensor | Moments, *, seed: int = 0, pairs: Sequence[tuple[int, int]] = ()
) -> Interval:
    """Compute ``FD(a, reference) - FD(b, reference)`` of runs of the same ids, row by row, with a 95 % interval.

    Each of ten disjoint shards of ids is left out of both runs in turn. With the ten differences ``theta_k``,
    ``se^2 = 9/10 sum_k (theta_k - mean)^2`` and the half width is Student's quantile times ``se``. Variation that the
    runs share cancels, so the interval is far narrower than those of the two distances. Simulated on Gaussians it
    covers 95 to 99 %, as subsampling half of the ids does at four to ten times the cost. It covers the mean at this
    number of images: the biases of the two distances cancel only as far as the runs' covariances are equal.

    Args:
        a, b: ``(n, d)``, at least 100 rows each.
        reference: features ``(m, d)`` or moments.
        seed: seed of the shards.
        pairs: rows of both runs and of the reference's features that are of one id, and are left out together.
    """
    a, b = checked(a, "a", least=10 * SHARDS), checked(b, "b", least=10 * SHARDS)
    paired(a, b)
    target_without, b = _target_by_shard(reference, a.shape[1], len(a), seed, pairs), b.to(a.device)

    def statistic(rows: Tensor, shard: int | None) -> float:
        target = target_without(shard)
        return between(gaussian(a[rows]), target) - between(gaussian(b[rows]), target)

    return _jackknife(len(a), statistic, seed, 0.0, bool(pairs))


def _target(reference: Tensor | Moments, d: int) -> Gaussian:
    """Fit the Gaussian of a reference of ``d`` features."""
    dim = reference.dim if isinstance(reference, Moments) else checked(reference, "reference", least=2).shape[1]
    if dim != d:
        raise DiffAccelError(
            f"The reference has {dim} features, the samples have {d}. Both must come from the same extractor."
        )
    return gaussian(reference)


def _target_by_shard(
    reference: Tensor | Moments, d: int, n: int, seed: int, pairs: Sequence[tuple[int, int]]
) -> Callable[[int | None], Gaussian]:
    """Return a function from the shard that is left out, or None, to the reference's Gaussian without its pairs."""
    whole = _target(reference, d)
    if not pairs or isinstance(reference, Moments):
        return lambda shard: whole
    own, theirs = torch.tensor(pairs, dtype=torch.long).T
    shard_of_row = torch.full((len(reference),), -1)  # rows without a pair are never left out
    shard_of_row[theirs] = _shards(n, seed)[own]
    kept = shard_of_row.to(reference.device)
    return lambda shard: whole if shard is None else gaussian(reference[kept != shard])


def _shards(n: int, seed: int) -> Tensor:
    """Return the shard of every row, (n,): random, and of sizes that differ by one at most."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    shard = torch.empty(n, dtype=torch.long)
    shard[order] = torch.arange(n) % SHARDS
    return shard


def _jackknife(
    n: int, statistic: Callable[[Tensor, int | None], float], seed: int, null: float | None, is_paired: bool
) -> Interval:
    """Evaluate a statistic of row indices on all ``n`` rows, with a jackknife interval over random shards of them."""
    shard, rows = _shards(n, seed), torch.arange(n)
    replicates = torch.tensor([statistic(rows[shard != k], k) for k in range(SHARDS)], dtype=torch.float64)
    error = float(((SHARDS - 1) / SHARDS * (replicates - replicates.mean()).square().sum()).sqrt())
    value = statistic(rows, None)
    half = _STUDENT * error
    held = "left out of both sides" if is_paired else "reference fixed"
    method = f"jackknife over {SHARDS} disjoint shards of {n} ids, {held}"
    return Interval(value, value - half, value + half, 0.95, method, null)
