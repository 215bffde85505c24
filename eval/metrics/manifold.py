"""Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) by nearest neighbours.

The ball of a point reaches to its k-th nearest neighbour in its own set, not counting the point itself. Squared
distances are float64, ``|x|^2 + |y|^2 - 2 x.y`` about a mean, tile by tile: memory is a few tiles beside the features.
This form has a rounding error of at most ``4 (d + 8) eps (|x|^2 + |y|^2)``. The error only matters at the edge of a
ball, where duplicates and equidistant points lie, so pairs that close to an edge are decided by ``sum (x - y)^2``
itself. Radii are such sums too: a point exactly on the edge compares equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval.metrics.feature_matrix import checked_pair

Boundary = Literal["<=", "<"]
TILE = (2048, 8192)  # rows, columns; 128 MiB
_PAIRS = 8192  # pairs whose distances are summed directly at a time
_SPARE = 4  # candidates beyond the k-th neighbour, since rounding can swap near-equal distances


def precision_recall(
    reference: Tensor, samples: Tensor, *, k: int = 3, boundary: Boundary = "<="
) -> tuple[float, float]:
    """Compute the share of samples in a ball of the reference, and of reference points in a ball of the samples.

    Args:
        reference: ``(n, d)``, more than ``k`` rows.
        samples: ``(m, d)``, more than ``k`` rows.
        k: the neighbour that sets the radius; 3 in the paper.
        boundary: "<=" if a ball includes its edge, as in the authors' code, ADM and torch-fidelity; else "<".
    """
    covered_samples, covered_reference = memberships(reference, samples, k=k, boundary=boundary)
    return _share(covered_samples), _share(covered_reference)


def memberships(reference: Tensor, samples: Tensor, *, k: int = 3, boundary: Boundary = "<=") -> tuple[Tensor, Tensor]:
    """Return which samples lie in a ball of the reference, (m,), and which reference points in one of theirs, (n,)."""
    x, y = _sets(reference, samples, k, k, boundary)
    x_radii, y_radii = _squared_radii(x, k), _squared_radii(y, k)
    x_inside = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    y_inside = torch.zeros(len(y), dtype=torch.bool, device=x.device)
    for tile in _tiles(x, y):
        y_inside[tile.columns] |= tile.inside(x_radii[tile.rows, None], boundary).any(0)
        x_inside[tile.rows] |= tile.inside(y_radii[None, tile.columns], boundary).any(1)
    return y_inside, x_inside


def density_coverage(
    reference: Tensor, samples: Tensor, *, k: int = 5, boundary: Boundary = "<"
) -> tuple[float, float]:
    """Compute density and coverage of samples.

    Density is the mean number of reference balls that contain a sample, over ``k``; coverage is the share of reference
    balls that contain a sample.

    Density is near 1 for equal distributions and has no upper bound. Coverage of equal distributions is
    ``1 - prod_{i=1..k} (n - i) / (n + m - i)``, short of 1.

    Args:
        reference: ``(n, d)``, more than ``k`` rows.
        samples: ``(m, d)``, at least one row.
        k: the neighbour that sets the radius; 5 in the paper.
        boundary: "<=" if a ball includes its edge; "<" if not, as in the authors' code (prdc).
    """
    balls, covered = ball_counts(reference, samples, k=k, boundary=boundary)
    return int(balls.sum()) / (k * len(balls)), _share(covered)


def ball_counts(reference: Tensor, samples: Tensor, *, k: int = 5, boundary: Boundary = "<") -> tuple[Tensor, Tensor]:
    """Return how many balls of the reference hold each sample, (m,), and which of them hold one, (n,)."""
    x, y = _sets(reference, samples, k, 0, boundary)
    radii = _squared_radii(x, k)
    covered = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    balls = torch.zeros(len(y), dtype=torch.long, device=x.device)
    for tile in _tiles(x, y):
        inside = tile.inside(radii[tile.rows, None], boundary)
        covered[tile.rows] |= inside.any(1)
        balls[tile.columns] += inside.sum(0)
    return balls, covered


def _share(inside: Tensor) -> float:
    """Divide whole numbers: a mean multiplies by 1/n on a GPU, and differs from a CPU's in the last bit."""
    return int(inside.sum()) / len(inside)


def _sets(reference: Tensor, samples: Tensor, k: int, k_samples: int, boundary: str) -> tuple[Tensor, Tensor]:
    """Validate both sets, and that they have a ``k``-th and a ``k_samples``-th neighbour."""
    if boundary not in ("<=", "<"):
        raise unknown("boundary", boundary, ("<=", "<"))
    if k < 1:
        raise DiffAccelError(f"The radius needs a neighbour: k must be at least 1, got {k}.")
    x, y = checked_pair(reference, samples, ("reference", "samples"))
    for name, points, needed in (("reference", x, k), ("samples", y, k_samples)):
        if len(points) <= needed:
            raise DiffAccelError(f"{name}: {len(points)} rows have no {needed}-th neighbour. Give more images.")
    return x, y


@dataclass(frozen=True, eq=False)
class _Tile:
    """Squared distances of a block of rows of ``x`` to a block of rows of ``y``, with bounds of their rounding."""

    rows: slice
    columns: slice
    squared: Tensor  # (a, b)
    rounding: Tensor  # (a, b)
    x: Tensor  # (a, d), not centred
    y: Tensor  # (b, d), not centred

    def inside(self, radii: Tensor, boundary: str) -> Tensor:
        """Compare the distances with squared radii, ``(a, 1)`` or ``(1, b)``."""
        compare = torch.le if boundary == "<=" else torch.lt
        result = compare(self.squared, radii)
        edge = ((self.squared - radii).abs_() <= self.rounding).nonzero()
        radii = radii.expand_as(result)
        for pairs in edge.split(_PAIRS):
            i, j = pairs.unbind(1)
            result[i, j] = compare(_sum_of_squares(self.x[i], self.y[j]), radii[i, j])
        return result


def _tiles(x: Tensor, y: Tensor) -> Iterator[_Tile]:
    """Yield the tiles row by row."""
    # centred, because far from 0 the squares would cancel the digits of the distances
    centre = x.mean(0, dtype=torch.float64)
    bound = 4 * (x.shape[1] + 8) * torch.finfo(torch.float64).eps
    for i in range(0, len(x), TILE[0]):
        rows = slice(i, min(i + TILE[0], len(x)))
        a = x[rows] - centre
        a_norms = a.square().sum(1, keepdim=True)
        for j in range(0, len(y), TILE[1]):
            columns = slice(j, min(j + TILE[1], len(y)))
            b = y[columns] - centre
            norms = a_norms + b.square().sum(1)
            yield _Tile(rows, columns, torch.addmm(norms, a, b.T, alpha=-2), norms * bound, x[rows], y[columns])


def _squared_radii(x: Tensor, k: int) -> Tensor:
    """Compute the squared distance of each row to its k-th nearest other row, ``(n,)``."""
    candidates = min(k + _SPARE, len(x) - 1)
    radii = torch.empty(len(x), dtype=torch.float64, device=x.device)
    near, index = radii, radii.long()
    for tile in _tiles(x, x):
        own = torch.arange(tile.rows.start, tile.rows.stop, device=x.device)[:, None]
        other = torch.arange(tile.columns.start, tile.columns.stop, device=x.device)
        squared = tile.squared.masked_fill_(own == other, torch.inf)
        nearest = squared.topk(min(candidates, squared.shape[1]), largest=False)
        if tile.columns.start == 0:
            near, index = nearest.values, nearest.indices
        else:
            near = torch.cat([near, nearest.values], 1)
            near, best = near.topk(min(candidates, near.shape[1]), largest=False)
            index = torch.cat([index, nearest.indices + tile.columns.start], 1).gather(1, best)
        if tile.columns.stop == len(x):
            pairs = torch.stack([own.expand_as(index), index], 2).flatten(0, 1)
            exact = torch.cat([_sum_of_squares(x[ij[:, 0]], x[ij[:, 1]]) for ij in pairs.split(_PAIRS)])
            radii[tile.rows] = exact.view_as(index).kthvalue(k, dim=1).values
    return radii


def _sum_of_squares(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``sum (a - b)^2`` of paired rows, added in an order that depends on ``d`` alone.

    A library's sum may order its terms by the number of rows, and equal distances would then differ in the last bit.
    """
    terms = (a.double() - b.double()).square_()
    while (width := terms.shape[1]) > 1:
        half = (width + 1) // 2
        terms[:, : width - half] += terms[:, half:]
        terms = terms[:, :half]
    return terms[:, 0]
