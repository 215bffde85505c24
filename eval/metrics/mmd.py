"""Kernel distances between feature sets: KID (arXiv 1801.01401) and CMMD (arXiv 2401.09603), in float64.

``MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)``. The U-statistic leaves ``k(x, x)`` out of the first two means and is
unbiased, so it can be slightly negative; the V-statistic keeps them. Where rows of both sets are paired, as pictures of
one prompt and seed are, ``k(x_i, y_i)`` is no product of independent rows either, and with it the statistic would be
negative by construction: it is left out of the third mean (Gretton et al. 2012, section 2.2). Kernels are summed block
by block: no matrix larger than a block is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics.feature_matrix import checked_pair

BLOCK = 4096
_NAMES = ("x", "y")
Kernel = Callable[[Tensor, Tensor], Tensor]  # (a, d), (b, d) -> (a, b)
RowPairs = Sequence[tuple[int, int]]  # rows of two sets that belong together; each row is in one pair at most


def kid(x: Tensor, y: Tensor, *, pairs: RowPairs = ()) -> float:
    """Compute KID over all rows: the U-statistic of ``MMD^2`` with ``k(x, y) = (x.y/d + 1)^3``.

    Papers usually print it times 1000.

    Args:
        x: ``(n, d)``.
        y: ``(m, d)``; each has at least two rows.
        pairs: rows of ``x`` and ``y`` of one id, whose products are left out.
    """
    x, y = checked_pair(x, y, _NAMES, least=2)
    return statistics(x, y, cubic, pairs)[0]


def kid_subsets(
    x: Tensor, y: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 2020, shrink: bool = False
) -> tuple[float, float]:
    """Compute mean and standard deviation of KID over random subsets, the customary way to report it.

    The deviation is the spread of estimates from ``size`` rows, not a standard error of the mean. Subsets are drawn as
    torch-fidelity draws them: for each, first from ``x``, then from ``y``, with NumPy's legacy generator. With
    ``shrink``, subsets have at most as many rows as the smaller set, as in clean-fid.
    """
    x, y = checked_pair(x, y, _NAMES, least=2)
    size = min(size, len(x), len(y)) if shrink else size
    if subsets < 1 or size < 2 or size > min(len(x), len(y)):
        raise DiffAccelError(
            f"{subsets} subsets of {size} rows cannot be drawn from {len(x)} and {len(y)} rows: "
            "a subset has at least 2 rows and at most those of the smaller set."
        )
    generator = np.random.RandomState(seed)  # published values come from this generator
    values = torch.empty(subsets, dtype=torch.float64)
    for i in range(subsets):
        a = torch.from_numpy(generator.choice(len(x), size, replace=False)).to(x.device)
        b = torch.from_numpy(generator.choice(len(y), size, replace=False)).to(x.device)
        values[i] = statistics(x[a], y[b], cubic)[0]
    return float(values.mean()), float(values.std(correction=0))


def gaussian_mmd2(x: Tensor, y: Tensor, *, sigma: float, unbiased: bool = False, pairs: RowPairs = ()) -> float:
    """Compute ``MMD^2`` with ``k(x, y) = exp(-|x - y|^2 / (2 sigma^2))``: V-statistic; if ``unbiased``, U-statistic."""
    if not sigma > 0:
        raise DiffAccelError(f"The kernel's sigma must be positive, got {sigma}.")
    x, y = checked_pair(x, y, _NAMES, least=2 if unbiased else 1)
    return statistics(x, y, gaussian(x, sigma), pairs)[0 if unbiased else 1]


def cmmd(x: Tensor, y: Tensor, *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Compute CMMD: ``scale`` times the V-statistic of ``MMD^2`` of L2-normalised CLIP image embeddings.

    Args:
        x, y: embeddings ``(n, d)`` and ``(m, d)``, normalised by this function.
    """
    return scale * gaussian_mmd2(unit_rows(x, "x"), unit_rows(y, "y"), sigma=sigma)


def cmmd_unbiased(x: Tensor, y: Tensor, *, sigma: float = 10.0, scale: float = 1000.0, pairs: RowPairs = ()) -> float:
    """Compute :func:`cmmd` by the U-statistic, which does not grow with fewer images. Not the published number."""
    return scale * gaussian_mmd2(unit_rows(x, "x"), unit_rows(y, "y"), sigma=sigma, unbiased=True, pairs=pairs)


def unit_rows(features: Tensor, label: str) -> Tensor:
    """Normalise rows to length 1, in float64."""
    features, _ = checked_pair(features, features, (label, label))
    norms = features.double().norm(dim=1, keepdim=True)
    if (norms == 0).any():
        raise DiffAccelError(f"{label}: {int((norms == 0).sum())} embeddings are all zero and have no direction.")
    return features / norms


def gaussian(x: Tensor, sigma: float) -> Kernel:
    """Return the Gaussian kernel less 1, of rows near those of ``x``."""
    # centred, so that squared distances lose no digits to a mean that both sets share
    centre = x.mean(0, dtype=torch.float64)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - centre, b - centre
        squared = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * (a @ b.T)
        # the constant 1 cancels in MMD^2; without it small distances keep their digits
        return torch.expm1(squared.clamp_min_(0) / (-2 * sigma**2))

    return kernel


def cubic(a: Tensor, b: Tensor) -> Tensor:
    """Evaluate ``(a.b/d + 1)^3``."""
    shifted = (a @ b.T).div_(a.shape[1]).add_(1)
    return shifted * shifted * shifted


def row_sums(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """Compute ``sum_j k(x_i, y_j)``, shape ``(n,)``."""
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for columns in y.split(BLOCK):
        columns = columns.double()
        for i in range(0, len(x), BLOCK):
            total[i : i + BLOCK] += kernel(x[i : i + BLOCK].double(), columns).sum(1)
    return total


def own_sums(x: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Compute ``sum_{j != i} k(x_i, x_j)`` and ``k(x_i, x_i)``, each ``(n,)``; half the work of :func:`row_sums`."""
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    own = torch.empty_like(total)
    for i in range(0, len(x), BLOCK):
        rows = x[i : i + BLOCK].double()
        block = kernel(rows, rows)
        own[i : i + BLOCK] = block.diagonal()
        block.fill_diagonal_(0)
        total[i : i + BLOCK] += block.sum(1)
        for j in range(i + BLOCK, len(x), BLOCK):
            block = kernel(rows, x[j : j + BLOCK].double())
            total[i : i + BLOCK] += block.sum(1)
            total[j : j + BLOCK] += block.sum(0)
    return total, own


def pair_products(x: Tensor, y: Tensor, pairs: RowPairs, kernel: Kernel) -> Tensor:
    """Compute the kernel of every pair of rows, (number of pairs,)."""
    own, theirs = torch.tensor(pairs, dtype=torch.long, device=x.device).view(-1, 2).T
    parts = [
        kernel(x[a].double(), y[b].double()).diagonal() for a, b in zip(own.split(256), theirs.split(256), strict=True)
    ]
    return torch.cat(parts) if pairs else torch.zeros(0, dtype=torch.float64, device=x.device)


def statistics(x: Tensor, y: Tensor, kernel: Kernel, pairs: RowPairs = ()) -> tuple[float, float]:
    """Compute the U-statistic and the V-statistic of ``MMD^2``, without the products of pairs."""
    n, m = len(x), len(y)
    (xx, x_own), (yy, y_own) = own_sums(x, kernel), own_sums(y, kernel)
    cross = (row_sums(x, y, kernel).sum() - pair_products(x, y, pairs, kernel).sum()) / (n * m - len(pairs))
    unbiased = float(xx.sum() / (n * (n - 1)) + yy.sum() / (m * (m - 1)) - 2 * cross) if min(n, m) > 1 else math.nan
    return unbiased, float((xx.sum() + x_own.sum()) / n**2 + (yy.sum() + y_own.sum()) / m**2 - 2 * cross)
