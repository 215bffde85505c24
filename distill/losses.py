"""The generator's loss of score implicit matching and its relatives, in one family."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Distance = Literal["huber", "l2"]
Weight = Literal["one", "teacher"]


def distance_gradient(y: Tensor, distance: Distance, c: float) -> Tensor:
    """Return ``d'(y)`` per sample: ``y / sqrt(|y|^2 + c^2)`` for the pseudo-Huber distance, ``y`` for half the square.

    ``|y|`` is the norm over all axes but the first. At ``c = 0`` and ``y = 0`` the gradient is zero.
    """
    if distance == "l2":
        return y
    square = y.square().sum(tuple(range(1, y.ndim)), keepdim=True) + c * c
    return y * torch.where(square > 0, square, torch.ones_like(square)).rsqrt()


def generator_loss(v: Tensor, r: Tensor, *, alpha: float, distance: Distance, c: float) -> Tensor:
    """Return ``-d'(v) . r + (1 - alpha) d'(v) . v`` of every sample, ``(B,)``.

    ``alpha = 1`` is score implicit matching (arXiv 2410.16794), whose gradient is that of the distance between the
    scores of generator and teacher; with "l2" and 1.2 it is SiD (arXiv 2404.04057), with 0.5 the exact gradient of the
    Fisher divergence (flow generator matching, arXiv 2410.19310). Where the outputs that ``v`` and ``r`` are made of
    are detached, "l2" gives the gradient of the Kullback-Leibler divergence (Diff-Instruct, arXiv 2305.18455).

    Args:
        v: difference of the assistant's and the teacher's estimates.
        r: difference of the assistant's estimate and the generated sample.
    """
    slope = distance_gradient(v, distance, c)
    axes = tuple(range(1, v.ndim))
    loss = -(slope * r).sum(axes)
    return loss if alpha == 1 else loss + (1 - alpha) * (slope * v).sum(axes)


def sample_weight(weight: Weight, x0: Tensor, teacher_clean: Tensor) -> Tensor:
    """Return ``w`` of every sample, detached: 1, or one over the mean of ``|x0 - D_T|`` (SiD, DMD)."""
    axes = tuple(range(1, x0.ndim))
    if weight == "one":
        return torch.ones(len(x0), dtype=x0.dtype, device=x0.device)
    with torch.no_grad():
        return 1 / (x0 - teacher_clean).abs().mean(axes).clamp_min(1e-5)
