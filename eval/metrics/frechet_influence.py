"""Influence of single rows on a Fréchet distance, without any further distance."""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.eval.metrics.feature_matrix import ROWS
from diffaccel.eval.metrics.frechet import Gaussian, Moments

_ROUND_OFF = 1e-13  # share of the largest eigenvalue


def influence(x: Tensor, target: Gaussian) -> Tensor:
    """Compute the derivative of ``FD(x, target)`` as each row of ``x`` gets more weight, (n,) around 0.

    With centred rows ``c_i``, ``K_i = L_y^T c_i`` and ``n - 1`` rows in the covariance, it is
    ``2 c_i.(mu_x - mu_y) + |c_i|^2 - sqrt(n - 1) ((K K^T)^(1/2))_ii``: the last two terms are ``c_i^T (I - T) c_i`` of
    the optimal transport map ``T`` between the Gaussians, written so that it holds for fewer rows than dimensions too.

    Args:
        x: ``(n, d)``, at least two rows.
        target: the Gaussian of the other side, held fixed.
    """
    n, mean = len(x), x.mean(0, dtype=torch.float64)
    shift, factor = mean - target.mean.to(x.device), target.factor.to(x.device)
    if not factor.shape[1]:  # rows that are all alike have no spread to be moved to
        roots = torch.zeros(n, dtype=torch.float64, device=x.device)
    elif n <= factor.shape[1]:
        k = (x.double() - mean) @ factor
        values, vectors = torch.linalg.eigh(k @ k.T)
        roots = (vectors.square() * values.clamp_min(0).sqrt()).sum(1)
    else:
        scatter = factor.T @ Moments.of(x).m2 @ factor
        values, vectors = torch.linalg.eigh((scatter + scatter.T) / 2)
        keep = values > _ROUND_OFF * values[-1]
        projection = factor @ (vectors[:, keep] * values[keep].pow(-0.25))
        roots = torch.cat([((rows.double() - mean) @ projection).square().sum(1) for rows in x.split(ROWS)])
    own = [2 * c @ shift + c.square().sum(1) for c in (rows.double() - mean for rows in x.split(ROWS))]
    influences = torch.cat(own) - (n - 1) ** 0.5 * roots
    return influences - influences.mean()
