"""Sampling error of a Fréchet distance: bias at finite n, extrapolation to infinite n, confidence intervals.

The reference is held fixed: intervals tell how far other samples of the same model would move the number. Where the
reference is paired with the samples, row by row, as a baseline's pictures of the same prompts and seeds are, other
samples come with another reference, and both rows of an id move together.
The ordinary bootstrap is wrong here, since repeated rows act like fewer images and the distance grows with 1/n. Its
resamples are of the rows' influences instead: see :mod:`diffaccel.eval.uncertainty.influence`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval.metrics.feature_matrix import checked, paired
from diffaccel.eval.metrics.frechet import Gaussian, Moments, between, gaussian
from diffaccel.eval.metrics.frechet_influence import influence
from diffaccel.eval.metrics.partners import Partners
from diffaccel.eval.uncertainty.influence import LEAST_ROWS, influence_interval
from diffaccel.eval.uncertainty.intervals import Interval

SHARDS = 10  # sizes of the extrapolation go down to that share of all rows
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
        fit_error: intercept of the line minus that of the quadratic, or twice the standard error of the quadratic's.
        warning: why the number is doubtful, or "".
    """

    interval: Interval
    slope: float
    r2: float
    fit: Fit
    sizes: tuple[int, ...]
    values: tuple[float, ...]
    fit_error: float
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

    The interval is that of the distance of all rows (:func:`distance_interval`), for the sampling error, widened by the
    error of the fit: of the line, its distance to the quadratic's intercept, and twice its standard error. All are
    added as variances; but where the smallest size is under ``2 d`` the line is known to be too low, and that distance
    is added as it is.

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
    values = _subset_means(features, target, counts, generator)
    u = n / torch.tensor(counts, dtype=torch.float64)
    line, line_variance, line_r2 = _fit(u, values, 1)
    curve, curve_variance, curve_r2 = _fit(u, values, 2)
    linear = fit == "linear"
    value = float(line[0] if linear else curve[0])
    error = float(line[0] - curve[0]) if linear else 2 * float(curve_variance) ** 0.5
    warning = ""
    if linear and counts[0] < 2 * d:
        warning = f"The smallest size, {counts[0]}, is under twice the {d} features: a straight line comes out too low."
    sampling = influence_interval(
        value, lambda rows: influence(features[rows.to(features.device)], target), n, held="reference fixed", seed=seed
    )
    scatter = 2 * float(line_variance) ** 0.5 if linear else 0.0
    interval = _widened(sampling, error, scatter, is_known=bool(warning), sizes=sizes)
    return Infinity(
        interval,
        slope=float(line[1]) * n,
        r2=line_r2 if linear else curve_r2,
        fit=fit,
        sizes=tuple(counts),
        values=tuple(values),
        fit_error=error,
        warning=warning,
    )


def infinity_difference(a: Tensor, b: Tensor, reference: Tensor | Moments, *, seed: int = 0) -> Interval:
    """Compute FD-infinity of ``a`` minus that of ``b``, runs of the same ids row by row, with a 95 % interval.

    Both are extrapolated from the same ids, so that the errors of their lines cancel too as far as they are equal.
    """
    of_a, of_b = (infinity(run, reference, seed=seed) for run in (a, b))
    paired_interval = difference(a, b, reference, seed=seed)
    value = of_a.value - of_b.value
    moved = replace(
        paired_interval,
        value=value,
        low=value + paired_interval.low - paired_interval.value,
        high=value + paired_interval.high - paired_interval.value,
    )
    error = of_a.fit_error - of_b.fit_error
    return _widened(moved, error, 0.0, is_known=bool(of_a.warning), sizes=len(of_a.sizes))


def _widened(sampling: Interval, error: float, scatter: float, *, is_known: bool, sizes: int) -> Interval:
    """Add error and scatter of a fit to an interval: as variances, the error as it is where its sign is known."""
    value = sampling.value
    ends = (value - sampling.low, sampling.high - value)
    low, high = (math.hypot(end, scatter) + abs(error) if is_known else math.hypot(end, error, scatter) for end in ends)
    method = f"fit in 1/n over {sizes} sizes, with its error; {sampling.method}"
    return replace(sampling, low=value - low, high=value + high, method=method)


def _subset_means(features: Tensor, target: Gaussian, counts: list[int], generator: torch.Generator) -> list[float]:
    """Return the mean distance over disjoint random subsets of each size."""
    n, means = len(features), []
    for count in counts:
        order = torch.randperm(n, generator=generator).to(features.device)
        subsets = order[: n // count * count].view(-1, count)
        distances = torch.tensor([between(gaussian(features[rows]), target) for rows in subsets], dtype=torch.float64)
        means.append(float(distances.mean()))
    return means


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
    """Compute ``FD(a, reference)`` with a 95 % interval from the influence of every row.

    The interval covers the mean of the distance at this number of images. It does not remove the bias of that mean:
    see :func:`infinity`.

    Args:
        a: ``(n, d)``, at least 30 rows.
        reference: features ``(m, d)`` or moments.
        seed: seed of halves and bootstrap.
        pairs: rows of ``a`` and of the reference's features that are of one id, and move together.
    """
    a = checked(a, "a", least=LEAST_ROWS)
    side = _Reference.of(reference, a, pairs)
    value = between(gaussian(a), side.whole)
    return influence_interval(
        value, lambda rows: side.influences(a, rows), len(a), held=side.held, positive=value, seed=seed
    )


def difference(
    a: Tensor, b: Tensor, reference: Tensor | Moments, *, seed: int = 0, pairs: Sequence[tuple[int, int]] = ()
) -> Interval:
    """Compute ``FD(a, reference) - FD(b, reference)`` of runs of the same ids, row by row, with a 95 % interval.

    An id's influence is that of its row of ``a`` minus that of its row of ``b``. Variation that the runs share cancels,
    so the interval is far narrower than those of the two distances. It covers the mean at this number of images: the
    biases of the two distances cancel only as far as the runs' covariances are equal.

    Args:
        a, b: ``(n, d)``, at least 30 rows each.
        reference: features ``(m, d)`` or moments.
        seed: seed of halves and bootstrap.
        pairs: rows of both runs and of the reference's features that are of one id, and move together.
    """
    a, b = checked(a, "a", least=LEAST_ROWS), checked(b, "b", least=LEAST_ROWS)
    paired(a, b)
    side, b = _Reference.of(reference, a, pairs), b.to(a.device)

    def influences(rows: Tensor) -> Tensor:
        return side.influences(a, rows) - side.influences(b, rows)

    value = between(gaussian(a), side.whole) - between(gaussian(b), side.whole)
    return influence_interval(value, influences, len(a), held=side.held, seed=seed)


def ratio(
    a: Tensor, b: Tensor, reference: Tensor | Moments, *, seed: int = 0, pairs: Sequence[tuple[int, int]] = ()
) -> Interval:
    """Compute ``FD(a, reference) / FD(b, reference)`` of runs of the same ids, row by row, with a 95 % interval.

    To first order its logarithm moves by each id's influence on the one distance over that distance, less the same of
    the other; the interval is that of the logarithm.

    Args:
        a, b, seed, pairs: as those of :func:`difference`.

    Raises:
        DiffAccelError: where a distance is 0, which has no ratio.
    """
    a, b = checked(a, "a", least=LEAST_ROWS), checked(b, "b", least=LEAST_ROWS)
    paired(a, b)
    side, b = _Reference.of(reference, a, pairs), b.to(a.device)
    of_a, of_b = (between(gaussian(run), side.whole) for run in (a, b))
    if min(of_a, of_b) <= 0:
        raise DiffAccelError(f"Distances of {of_a:g} and {of_b:g} have no ratio; compare them by their difference.")

    def influences(rows: Tensor) -> Tensor:
        parts = [(run[rows.to(run.device)], side.influences(run, rows)) for run in (a, b)]
        first, second = (own / between(gaussian(x), side.whole) for x, own in parts)
        return first - second

    log = influence_interval(math.log(of_a / of_b), influences, len(a), held=side.held, seed=seed)
    return replace(log, value=math.exp(log.value), low=math.exp(log.low), high=math.exp(log.high), null=1.0)


@dataclass(frozen=True, eq=False)
class _Reference:
    """The other side of a distance.

    Attributes:
        whole: its Gaussian.
        features: its rows; None where they are held fixed.
        partners: which of them move with the rows of the samples; None where they are held fixed.
    """

    whole: Gaussian
    features: Tensor | None = None
    partners: Partners | None = None

    @classmethod
    def of(cls, reference: Tensor | Moments, a: Tensor, pairs: Sequence[tuple[int, int]]) -> _Reference:
        """Fit the Gaussian of a reference, and keep its rows where they move with those of ``a``."""
        whole = _target(reference, a.shape[1])
        if not pairs or isinstance(reference, Moments):
            return cls(whole)
        return cls(whole, reference.to(a.device), Partners.of(pairs, len(a), len(reference)))

    @property
    def held(self) -> str:
        """What is held on this side, as a report prints it."""
        return "reference fixed" if self.partners is None else "both sides paired"

    def influences(self, samples: Tensor, rows: Tensor) -> Tensor:
        """Return the influence of rows of the samples on their distance, with that of their partners."""
        x = samples[rows.to(samples.device)]
        if self.features is None or self.partners is None:
            return influence(x, self.whole)
        places, kept = (index.to(x.device) for index in self.partners.with_rows(rows))
        y = self.features[kept]
        influences, theirs = influence(x, gaussian(y)), influence(y, gaussian(x))
        influences[places] += theirs[: len(places)] * (len(x) / len(y))
        return influences - influences.mean()


def _target(reference: Tensor | Moments, d: int) -> Gaussian:
    """Fit the Gaussian of a reference of ``d`` features."""
    dim = reference.dim if isinstance(reference, Moments) else checked(reference, "reference", least=2).shape[1]
    if dim != d:
        raise DiffAccelError(
            f"The reference has {dim} features, the samples have {d}. Both must come from the same extractor."
        )
    return gaussian(reference)
