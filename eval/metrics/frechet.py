"""Fréchet distance between Gaussians fitted to features (Heusel et al., arXiv 1706.08500), in float64.

``FD = |mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr((S_x S_y)^(1/2))`` with unbiased covariances. With ``S = L L^T`` the
last trace is the nuclear norm of ``L_x^T L_y``: its singular values are the square roots of the eigenvalues of
``S_x S_y``, so no square root is taken of round-off and a rank-deficient covariance costs no digits. ``L`` is
``U sqrt(lambda)`` from an eigendecomposition, or the centred features themselves where there are fewer rows than
dimensions. No epsilon is ever added to a diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics.feature_matrix import ROWS, checked, checked_pair

ROUND_OFF = 1e-8  # share of the sum of both traces, below the resolution of float32 features


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter matrix of features, in float64; those of parts of a set merge into those of the whole.

    Attributes:
        n: number of rows; None for a covariance from a file that does not give it.
        mean: ``(d,)``.
        m2: ``(d, d)``, the sum of ``(f - mean)(f - mean)^T`` over rows; the covariance itself where ``n`` is None.
    """

    n: int | None
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Compute the moments of a matrix ``(n, d)`` of any floating dtype, centred before it is squared.

        Raises:
            DiffAccelError: see :func:`diffaccel.eval.metrics.feature_matrix.checked`.
        """
        blocks = checked(features).split(ROWS)
        n, d = features.shape
        mean = torch.stack([rows.double().sum(0) for rows in blocks]).sum(0) / n
        m2 = mean.new_zeros(d, d)
        for rows in blocks:
            centred = rows.double() - mean
            m2.addmm_(centred.T, centred)
        return cls(n, mean, m2)

    @classmethod
    def from_covariance(cls, mean: Tensor, covariance: Tensor, n: int | None = None) -> Moments:
        """Build moments from a mean ``(d,)`` and an unbiased covariance ``(d, d)`` of ``n`` rows, if that is known."""
        d = mean.shape[0] if mean.ndim == 1 else 0
        if covariance.shape != (d, d):
            shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
            raise DiffAccelError(f"A mean (d,) and a covariance (d, d) are needed, got {shapes}.")
        if n is not None and n < 2:
            raise DiffAccelError(f"A covariance needs at least 2 rows, got n={n}.")
        mean, covariance = mean.double(), covariance.double()
        checked(covariance, "covariance")
        checked(mean[None], "mean")
        return cls(n, mean, covariance if n is None else covariance * (n - 1))

    @property
    def dim(self) -> int:
        """Number of features ``d``."""
        return self.mean.shape[0]

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance, ``m2 / (n - 1)``; needs two rows."""
        if self.n is None:
            return self.m2
        if self.n < 2:
            raise DiffAccelError(f"A covariance needs at least 2 rows, got n={self.n}. Add images.")
        return self.m2 / (self.n - 1)

    def merge(self, other: Moments) -> Moments:
        """Compute the moments of both sets together, by the pairwise update of Chan, Golub and LeVeque (1979).

        ``M2 = M2_a + M2_b + delta delta^T n_a n_b / (n_a + n_b)`` with ``delta = mean_b - mean_a``.
        """
        if self.dim != other.dim:
            raise DiffAccelError(f"Moments of {self.dim} and of {other.dim} features cannot be merged.")
        if self.n is None or other.n is None:
            raise DiffAccelError("Statistics without a count of images cannot be merged. Compute them from the images.")
        n = self.n + other.n
        delta = other.mean.to(self.mean.device) - self.mean
        m2 = self.m2 + other.m2.to(self.m2.device) + torch.outer(delta, delta) * (self.n * other.n / n)
        return Moments(n, self.mean + delta * (other.n / n), m2)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Gaussian in the form that :func:`between` takes: ``factor (d, r)`` with ``factor factor^T = covariance``."""

    mean: Tensor
    trace: Tensor
    factor: Tensor


def gaussian(source: Tensor | Moments) -> Gaussian:
    """Fit the Gaussian of features ``(n, d)`` or of moments, at least two rows.

    Features with fewer rows than dimensions are their own factor: ``(f - mean)^T / sqrt(n - 1)``.
    """
    if isinstance(source, Moments):
        covariance = source.covariance
        return Gaussian(source.mean, covariance.trace(), _factor(covariance, source.n))
    n, d = checked(source, least=2).shape
    if n > d:
        return gaussian(Moments.of(source))
    rows = source.double()
    mean = rows.mean(0)
    factor = (rows - mean).T / (n - 1) ** 0.5
    return Gaussian(mean, factor.square().sum(), factor)


def _factor(covariance: Tensor, n: int | None) -> Tensor:
    """Factor a covariance as ``U sqrt(lambda)``, without the directions that hold nothing but round-off."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    d, largest = len(values), float(values[-1].clamp_min(0))
    if float(values[0]) < -1e-6 * largest:
        raise DiffAccelError(
            f"This is no covariance: its smallest eigenvalue is {float(values[0]):.3g}, its largest {largest:.3g}."
        )
    # A null direction comes out as +-eps * largest. Its square root, 1e-8, would count in the nuclear norm.
    keep = values > torch.finfo(torch.float64).eps * d**0.5 * largest
    if n is not None:
        keep[: max(d - n + 1, 0)] = False  # the rank is at most n - 1
    return vectors[:, keep] * values[keep].sqrt()


def between(x: Gaussian, y: Gaussian) -> float:
    """Compute the distance of two Gaussians, ``|mu_x - mu_y|^2 + tr S_x + tr S_y - 2 |L_x^T L_y|_*``.

    Magnitudes under 1e-8 of the sum of both traces are rounding errors and are returned as 0.

    Raises:
        ArithmeticError: for a value that is more negative than that, which exact arithmetic cannot give.
    """
    device = x.mean.device
    cross = x.factor.T @ y.factor.to(device)
    # cuSOLVER's default, Jacobi, is much slower at this size and no more accurate
    nuclear = torch.linalg.svdvals(cross, driver="gesvd" if cross.is_cuda else None).sum()
    traces = x.trace + y.trace.to(device)
    value = float((x.mean - y.mean.to(device)).square().sum() + traces - 2 * nuclear)
    limit = ROUND_OFF * float(traces)
    if value < -limit:
        raise ArithmeticError(f"Internal error: Fréchet distance {value} is negative beyond rounding ({limit:.3g}).")
    return 0.0 if abs(value) < limit else value


def distance(x: Moments, y: Moments) -> float:
    """Compute the Fréchet distance of statistics. It depends on the number of images: print ``n`` and ``m`` beside it.

    Raises:
        DiffAccelError: other dimensions, fewer than two rows, or a matrix that is no covariance.
    """
    if x.dim != y.dim:
        raise DiffAccelError(f"Statistics of {x.dim} and of {y.dim} features; both must come from the same extractor.")
    return between(gaussian(x), gaussian(y))


def distance_of_features(x: Tensor, y: Tensor) -> float:
    """Compute the Fréchet distance of two feature matrices ``(n, d)`` and ``(m, d)``, at least two rows each.

    With fewer rows than dimensions no covariance is formed: the trace term is ``|X Y^T|_* / sqrt((n-1)(m-1))`` of the
    centred features.
    """
    x, y = checked_pair(x, y, ("x", "y"), least=2)
    return between(gaussian(x), gaussian(y))
