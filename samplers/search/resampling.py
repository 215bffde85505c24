"""Draws among particles by their weights, with random numbers that depend on a key alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffaccel.samplers.search.noise import seed_of
from diffaccel.samplers.search.particles import Key

_DRAW = -1  # the attempt in the key of such a number; no noise has it


def uniform(seed: int, chain: int, stage: int) -> float:
    """Draw one number in [0, 1)."""
    generator = torch.Generator("cpu").manual_seed(seed_of(seed, Key(chain, stage, _DRAW)))
    return float(torch.rand((), generator=generator, dtype=torch.float64, device="cpu"))


def softmax(logits: Sequence[float]) -> list[float]:
    """Return weights that sum to 1; equal ones where the highest logit is not finite."""
    top = max(logits)
    if not math.isfinite(top):
        return [1 / len(logits)] * len(logits)
    weights = [math.exp(logit - top) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def effective_size(weights: Sequence[float]) -> float:
    """Return the effective sample size ``1 / sum w^2``, from 1 to the number of weights."""
    return 1 / math.fsum(weight * weight for weight in weights)


def systematic(weights: Sequence[float], u: float) -> list[int]:
    """Resample systematically: particle i becomes the ancestor of ``n w_i`` children, rounded up or down.

    Child k has the first ancestor i with ``w_0 + ... + w_i >= (u + k) / n`` (Douc and Cappe 2005).

    Args:
        weights: ``n`` weights that sum to 1.
        u: offset in [0, 1).

    Returns:
        The index of the ancestor of each of the ``n`` children.
    """
    n, total, ancestors, i = len(weights), weights[0], [], 0
    for k in range(n):
        while (u + k) / n > total and i < n - 1:
            i += 1
            total += weights[i]
        ancestors.append(i)
    return ancestors


def draw(rewards: Sequence[float], temperature: float, seed: int, chain: int, stage: int) -> int:
    """Draw an index from ``softmax(r / temperature)``; temperature 0 takes the first of the highest rewards."""
    if temperature == 0:
        return max(range(len(rewards)), key=lambda i: rewards[i])
    return _drawn([reward / temperature for reward in rewards], uniform(seed, chain, stage))


def draw_weighted(logits: Sequence[float], seed: int, key: Key) -> int:
    """Draw an index from ``softmax(logits)`` by a random number of its own key."""
    generator = torch.Generator("cpu").manual_seed(seed_of(seed, key))
    return _drawn(logits, float(torch.rand((), generator=generator, dtype=torch.float64, device="cpu")))


def _drawn(logits: Sequence[float], u: float) -> int:
    """Return the first index at which the summed weights pass ``u``."""
    weights = softmax(logits)
    for i, weight in enumerate(weights):
        u -= weight
        if u < 0:
            return i
    return len(weights) - 1


def systematic_rows(weights: Tensor, u: Tensor) -> Tensor:
    """Resample systematically in every row, as :func:`systematic` does, without leaving the device.

    Args:
        weights: ``(B, n)``, which sum to 1 in a row.
        u: offsets in [0, 1), ``(B,)``.

    Returns:
        The index of the ancestor of each child, ``(B, n)``.
    """
    n = weights.shape[1]
    ranks = torch.arange(n, dtype=weights.dtype, device=weights.device)
    totals = weights.cumsum(1)
    return torch.searchsorted(totals, (u[:, None] + ranks) / n).clamp(max=n - 1)
