"""Draws among particles by their weights, from random numbers that depend on a key alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from diffaccel.samplers.search.noise import seed_of
from diffaccel.samplers.search.particles import Key

_DRAW = -1  # as the attempt of a key: no noise has it


def uniform(seed: int, chain: int, stage: int) -> float:
    """One number in [0, 1)."""
    generator = torch.Generator().manual_seed(seed_of(seed, Key(chain, stage, _DRAW)))
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def softmax(logits: Sequence[float]) -> list[float]:
    """Weights that sum to 1; equal ones where no logit is finite."""
    top = max(logits)
    if not math.isfinite(top):
        return [1 / len(logits)] * len(logits)
    weights = [math.exp(logit - top) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def effective_size(weights: Sequence[float]) -> float:
    """``1 / sum w^2``, from 1 to their number."""
    return 1 / math.fsum(weight * weight for weight in weights)


def systematic(weights: Sequence[float], u: float) -> list[int]:
    """Ancestors of as many children as there are weights: particle i has ``n w_i`` of them, rounded up or down (Douc
    and Cappe 2005). ``u`` in [0, 1) shifts the comb."""
    n, total, chosen, i = len(weights), weights[0], [], 0
    for k in range(n):
        while (u + k) / n > total and i < n - 1:
            i += 1
            total += weights[i]
        chosen.append(i)
    return chosen


def draw(rewards: Sequence[float], temperature: float, seed: int, chain: int, stage: int) -> int:
    """The place of the highest reward, the first of equal ones; or one drawn from ``softmax(r / temperature)``."""
    if temperature == 0:
        return max(range(len(rewards)), key=lambda i: rewards[i])
    weights, u = softmax([reward / temperature for reward in rewards]), uniform(seed, chain, stage)
    for i, weight in enumerate(weights):
        u -= weight
        if u < 0:
            return i
    return len(weights) - 1
