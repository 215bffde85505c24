"""MIND, the Monge Inception Distance (arXiv 2605.06797), on the same features as the Fréchet distance."""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics.feature_matrix import checked_pair

_CHUNK = 64  # directions projected and sorted at a time


def mind(x: Tensor, y: Tensor, *, projections: int = 1000, seed: int = 0) -> float:
    """Compute the sliced squared 2-Wasserstein distance ``3 d mean_u W_2^2(u.x, u.y)``, over random unit vectors ``u``.

    In one dimension ``W_2^2`` is the integral over ``q`` in [0, 1] of the squared difference of both quantile
    functions, computed exactly from sorted values for any ``n`` and ``m``; the paper draws ``min(n, m)`` rows instead.
    A shift by ``s`` gives ``3 |s|^2`` on average over directions. Sampling bias is positive and falls with ``n``:
    compare equal sizes only.

    Args:
        x: ``(n, d)``.
        y: ``(m, d)``.
        projections: number of directions, drawn from ``seed``.
    """
    x, y = checked_pair(x, y, ("x", "y"))
    if projections < 1:
        raise DiffAccelError(f"MIND needs at least one direction, got projections={projections}.")
    d = x.shape[1]
    directions = torch.randn(projections, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    # both quantile functions are steps at levels i/n and j/m; the integers m i and n j keep equal levels equal
    n, m = len(x), len(y)
    edges = torch.cat([torch.arange(0, n + 1) * m, torch.arange(0, m + 1) * n]).unique().to(x.device)
    weights = edges.diff().double() / (n * m)
    rank_x, rank_y = edges[:-1] // m, edges[:-1] // n
    x, y = x.double(), y.double()
    total = weights.new_zeros(())
    for u in directions.to(x.device).split(_CHUNK):
        gap = (x @ u.T).sort(dim=0).values[rank_x] - (y @ u.T).sort(dim=0).values[rank_y]
        total += weights @ gap.square().sum(1)
    return float(3 * d * total / projections)
