"""Weighted sums of rewards, and how they are written: ``clip + 0.2*compress``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.rewards.reward import Reward

_BETWEEN = re.compile(r"\s+([+-])(?:\s+|$)")  # spaces, since names and paths have hyphens of their own
_TERM = re.compile(r"(?P<sign>[+-]?)\s*(?:(?P<weight>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*)?(?P<name>\S.*)")


def terms(text: str) -> list[tuple[float, str]]:
    """Weights and names of ``0.7*clip - 0.1*compress``; signs between terms stand between spaces.

    Raises:
        DiffAccelError: for text that is no such sum.
    """
    first, *rest = _BETWEEN.split(text.strip())
    found = []
    for sign, part in zip(("+", *rest[::2]), (first, *rest[1::2]), strict=True):
        match = _TERM.fullmatch(part.strip())
        if match is None:
            raise DiffAccelError(f"'{text}' is no reward. Write names with weights, such as clip + 0.2*compress.")
        weight = float(match["weight"] or 1)
        found.append((-weight if (sign == "-") != (match["sign"] == "-") else weight, match["name"]))
    return found


def weighted(parts: Sequence[tuple[float, Reward]]) -> Reward:
    """``sum_i w_i r_i``, in float64. It is differentiable where all its terms are; one NaN makes the sum NaN.

    Raises:
        DiffAccelError: for no terms, weights that are not finite, or terms that take different inputs.
    """
    if not parts:
        raise DiffAccelError("A sum of rewards has at least one term.")
    for weight, reward in parts:
        if not torch.isfinite(torch.tensor(float(weight))):
            raise DiffAccelError(f"The weight of the reward '{reward.name}' is {weight}; it must be a finite number.")
    inputs = {reward.input: reward.name for _, reward in parts}
    if len(inputs) > 1:
        told = ", ".join(f"'{name}' takes {kind}" for kind, name in inputs.items())
        raise DiffAccelError(f"Rewards of one sum take the same input; {told}. Sum rewards of one kind.")
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]

    def total(images: Tensor, prompts: list[str]) -> Tensor:
        each = (weight * reward.numbers(images, prompts).to("cpu", torch.float64) for weight, reward in parts)
        return reduce(torch.add, each)

    rewards = [reward for _, reward in parts]
    return Reward(
        name=_written(parts),
        function=total,
        input=rewards[0].input,
        batch_size=min(reward.batch_size for reward in rewards),
        differentiable=all(reward.differentiable for reward in rewards),
        needs_prompts=any(reward.needs_prompts for reward in rewards),
    )


def _written(parts: Sequence[tuple[float, Reward]]) -> str:
    text = ""
    for weight, reward in parts:
        sign = ("-" if weight < 0 else "") if not text else (" - " if weight < 0 else " + ")
        text += sign + (reward.name if abs(weight) == 1 else f"{abs(weight):g}*{reward.name}")
    return text
